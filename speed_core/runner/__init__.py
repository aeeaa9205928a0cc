"""Run notebooks headlessly, many of them, on this machine and the next.

arguments     values of the command line
notebook      execute one notebook, with a true status
batch         execute the numbered notebooks, in order
sweep         grids of values and seeds
paper_sweeps  the sweeps of SPEED's Fig. 3 and Table 3
replicates    generators trained more than once
parallel      models of one notebook made side by side
preflight     is this machine ready
recorded      this run beside the recorded one
replay        data sets again from the logs alone
run_archive   a run in one file
cards         model and data cards
own_tasks     a scorecard for your own texts
"""
