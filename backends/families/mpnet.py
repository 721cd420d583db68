"""MPNet (all-mpnet-base-v2): its attention has a learned relative bias and takes no attention function, so it
runs padded.
"""

from backends.families.base import Family, after_padding

FAMILY = Family(
    name="mpnet",
    model_types=("mpnet",),
    position_offset=after_padding,
    load_arguments={"add_pooling_layer": False},
)
