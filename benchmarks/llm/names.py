"""The names of what is compared, as they stand in the tables."""

DIRECT, NGINX, AIOHTTP, LITELLM, MITMPROXY, OURS = "direct", "nginx", "aiohttp", "LiteLLM", "mitmproxy", "cloister"
