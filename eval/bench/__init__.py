"""The benchmark: samples of pipelines under a protocol, as rows of a report."""
