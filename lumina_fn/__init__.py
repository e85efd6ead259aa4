"""Lumina-mGPT 2.0 as pure functions over parameter trees.

    from lumina_fn import checkpoint, model, prompt, sample, train

    params, cfg = checkpoint.load_model("Lumina-mGPT-2.0")         # a tree of tensors, and sizes
    vq_params, vq_cfg = checkpoint.load_vq("movqgan_270M.ckpt")    # pictures to codes and back
    tokenizer = prompt.load_tokenizer("Lumina-mGPT-2.0")

    logits = model.forward(params, tokens, cfg)                    # tokens [B T] -> [B T V] float32
    loss, terms = train.loss(params, train.Batch(tokens, labels), cfg)
    grads = torch.func.grad(lambda p: train.loss(p, batch, cfg)[0])(params)

    ids = prompt.prompt_ids(tokenizer, "a lighthouse at dusk", 768, 768)
    codes = sample.generate(params, ids, cfg, height=768, width=768)
    sample.picture(codes, vq_params, vq_cfg).save("lighthouse.png")

The model is model.py, vq.py, loss.py, gradients.py, optim.py, sharding.py and train.py; sample.py, scores.py and decode.py draw.
formats reads other tools' files, features is training data, state is checkpoints, costs predicts time and memory, programs is export,
disk touches files, process is what happens around a command. Commands: `lumina`, or `python -m experiments.finetune --help`.
"""

from lumina_fn.process import startup

__version__ = "0.3.0"

startup.begin()
startup.keep_compiled_code()
