"""The junior and senior generators at work (SPEED Eq. 1 and 3): fine-tuning on seeds, then generation that loses no request.

sft                  supervised fine-tuning on the completion alone
generate             one request, one logged outcome
engines              requests, completions, decoding, and the choice of an engine
vllm_engine          vLLM in a child process
vllm_worker          the child process
transformers_engine  Transformers in this process
server_engine        any OpenAI-compatible server
ray_engine           several processes or machines
top_p                nucleus sampling without sorting the vocabulary
"""
