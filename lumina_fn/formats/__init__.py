"""Files of other tools and of the released weights: the places and names of their tensors. No pickle is executed.

names          parameter names: tree paths here, state dict keys there
hf_config      a Hugging Face config.json as a ModelConfig
vq_config      the sizes of a MoVQGAN, inferred from its tensors
tensor_files   the place of each tensor's bytes, and copies of them in chunks
torch_zip      .pt and .ckpt files
dcp            folders of torch.distributed.checkpoint
mindspeed      folders of MindSpeed-MM
safe_pickle    the pickle inside a torch file, read without executing it
plain_pickle   a pickle of lists, dicts, ints and strings
"""
