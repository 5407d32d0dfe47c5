"""The loss scale of a float16 run.

Source: DeeperSpeed fp16/loss_scaler.py.
"""


class LossScaler:
    """DeepSpeed's dynamic loss scale with Pythia's settings; its memory is `state`, a JSON object.

    Not enabled, as for float32 and bfloat16, the scale is 1 and the state rests, for a launch in
    float16. On an overflow the update is skipped and the learning rate does not advance, but the
    data does. The first overflow of two is forgiven (hysteresis, refilled only when the scale
    grows), later ones halve the scale; 1000 iterations without one double it.
    """

    def __init__(self, enabled):
        self.enabled = enabled
        self.state = {"scale": 4096.0, "hysteresis": 2, "iteration": 0, "last_overflow": -1}

    @property
    def scale(self):
        return self.state["scale"] if self.enabled else 1.0

    def update(self, overflow):
        """Note one iteration. Raises FloatingPointError on an overflow at the smallest scale, 1."""
        state = self.state
        if not self.enabled:
            return
        if overflow:
            if state["scale"] == 1.0:
                raise FloatingPointError(
                    "overflow at loss scale 1, the smallest: the run has diverged. Look at the "
                    "loss in metrics.csv; branch from an earlier checkpoint with a lower rate or "
                    "--dtype=bfloat16")
            if state["hysteresis"] == 1:
                state["scale"] = max(state["scale"] / 2, 1.0)
            else:
                state["hysteresis"] -= 1
            state["last_overflow"] = state["iteration"]
        elif (state["iteration"] - state["last_overflow"]) % 1000 == 0:
            state["scale"] *= 2
            state["hysteresis"] = 2
        state["iteration"] += 1
