"""Makes a loaded model faster without knowing its family: its layers are found by how they are put together.

Projections of one input (query, key and value; gate and up) become one product, and what follows a product is
computed with it: on a CPU by the matrix library, on a GPU by kernels. A layer that is put together as BERT's
are becomes one module. The self-check compares the result with the model as it was: a family that does
otherwise than its layers' names say stays as it is.
"""

from backends.fusion.finder import fuse

__all__ = ["fuse"]
