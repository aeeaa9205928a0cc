"""The junior and senior generators at work (SPEED Eq. 1 and 3): fine-tuning on seeds, then generation that loses no request.

sft                supervised fine-tuning on the completion alone
generate           one request, one logged outcome
engines            the interface; vLLM in a child process, Transformers in this one
vllm_worker        the child process
continuous_engine  continuous batching in Transformers
server_engine      any OpenAI-compatible server
ray_engine         several processes or machines
top_p              nucleus sampling without sorting the vocabulary
"""
