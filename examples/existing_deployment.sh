#!/bin/sh
# A deployment whose command line stays as it is: the environment asks for offloading, in every process vLLM starts.
#   examples/existing_deployment.sh MODEL [whatever vllm serve was given before]
# Dense models are served as ever.
set -eu
export VLLM_MOE_OFFLOAD='{"cache": "25%", "history": "off"}'
# Where this is set, vLLM loads no other plugins.
if [ -n "${VLLM_PLUGINS:-}" ]; then export VLLM_PLUGINS="$VLLM_PLUGINS,moe-offload"; fi
exec vllm serve "$@"
