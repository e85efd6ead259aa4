"""Files of other tools, and of the released weights: where their tensors lie and what they are called. No pickle is executed.

names          parameter names: tree paths here, state dict keys there
hf_config      a Hugging Face config.json as a ModelConfig
vq_config      the sizes of a MoVQGAN, read off its tensors
tensor_files   where each tensor's bytes lie, and how they get elsewhere in chunks
torch_zip      .pt and .ckpt files
dcp            folders of torch.distributed.checkpoint
mindspeed      folders of MindSpeed-MM
safe_pickle    the pickle inside a torch file, read without running it
plain_pickle   a pickle of lists, dicts, ints and strings
"""
