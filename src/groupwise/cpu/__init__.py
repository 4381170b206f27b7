"""What exists only to be fast on a CPU: compiled kernels, packed linear layers, cores, malloc, copies of this process.

Nobody else compiles, forks or sets malloc. `kernels.compiled()` says whether there are compiled kernels,
`forks.may_fork()` whether this process can have copies; everything has a plain form that takes its place elsewhere."""
