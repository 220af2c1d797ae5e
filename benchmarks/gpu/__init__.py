"""What is run where a GPU is at hand for minutes: stages of jobs that bring facts home. See benchmarks/GPU.md."""
