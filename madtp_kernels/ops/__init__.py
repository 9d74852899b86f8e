"""The ops: schema, checks, fake, autograd and backend choice. Kernels live in the backends."""
