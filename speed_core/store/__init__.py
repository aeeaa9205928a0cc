"""What stays on disk: published artifacts with their manifests, and the folder of a run.

artifacts    publish a folder by rename, its manifest last; find the first difference to what is asked for
run_context  the open run: its profile, its folder, its store
"""
