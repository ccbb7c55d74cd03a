"""The data plane of model calls: carries requests to upstreams and answers back, and asks `cloister.llm` what to do."""
