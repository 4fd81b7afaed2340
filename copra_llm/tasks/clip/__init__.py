"""Few-shot classification of images with CLIP: which sets, which images, which of them are the shots.

    catalogue -> folders (layouts, hub_images) -> few_shot

`catalogue` names the sets and their templates, `folders.read_images` finds their images and class names, `few_shot`
draws the shots; `check` looks into every image before anything is trained on them.

Source: CoOp (Zhou et al. 2022, arXiv 2109.01134) for splits, class names and templates; CLIP-LoRA (Zanella and
Ben Ayed 2024, arXiv 2405.18541) for the protocol.
"""
