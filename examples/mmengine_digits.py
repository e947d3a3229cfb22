"""Digits with an averaged network, as a config for mmengine.

    python examples/mmengine_train.py examples/mmengine_digits.py

The line marked (1) is all there is of ema_fused. With ``type="EMAHook"`` in it mmengine's own hook
runs, with the same results and checkpoints to the bit.
"""

# Configs of mmengine are written in dict(...), which the linter would have as braces.
# ruff: noqa: C408

custom_imports = dict(imports=["mmengine_digits_parts"])

custom_hooks = [
    dict(
        type="ema_fused.hooks.mmengine.EMAHook",  # (1)
        ema_type="ExponentialMovingAverage",
        momentum=0.02,  # of the new weights: the average looks back over about 50 steps
        # The network has no buffers. With batch norm, update_buffers=True averages its running
        # statistics as well.
    )
]

model = dict(type="DigitsNetwork", width=32)

train_dataloader = dict(
    dataset=dict(type="Digits", part="training"),
    sampler=dict(type="DefaultSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
    batch_size=16,
    num_workers=0,
)
val_dataloader = dict(
    dataset=dict(type="Digits", part="validation"),
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    batch_size=128,
    num_workers=0,
)
val_evaluator = dict(type="DigitsAccuracy")

train_cfg = dict(by_epoch=True, max_epochs=10, val_interval=1)
val_cfg = dict(type="ValLoop")

# The learning rate is high and never lowered: the weights keep jumping about a good place without
# settling there. That is when an average is worth having.
optim_wrapper = dict(optimizer=dict(type="SGD", lr=0.1, momentum=0.9))

default_hooks = dict(
    checkpoint=dict(
        type="CheckpointHook", interval=1, max_keep_ckpts=2, save_param_scheduler=False
    ),
    logger=dict(type="LoggerHook", interval=20),
)
randomness = dict(seed=0)
