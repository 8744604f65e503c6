"""A few steps with an installed wheel: `make package` runs it where torch is all else that is there."""

import importlib.util
from importlib.resources import files

import torch

import subspan

assert importlib.util.find_spec("transformers") is None, "this environment has more than torch"
assert (files("subspan") / "py.typed").is_file()
model = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(64, 64)]))
optimizer = subspan.GaLoreAdamW8bit(subspan.param_groups(model, rank=8, verbose=False), lr=0.1, gradients="project")
losses = []
for _ in range(5):
    loss = model[0][0](torch.ones(4, 64)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
torch.save(optimizer.state_dict(), "state.pt")
optimizer.load_state_dict(torch.load("state.pt", weights_only=True))
print(f"subspan {subspan.__version__} from {subspan.__file__}: loss {losses[0]:.3f} to {losses[-1]:.3f}")
