"""Does the theory of GaLore hold where its premises do? Theorem 3.8 and Lemma 3.3 of arXiv 2403.03507v2, by number.

    python reproductions/reversible_network/run.py

Both speak of gradients of the form (G is the negative gradient, as in the paper)

    G_t = 1/N sum_i (A_i - B_i W_t C_i)       (m, n); B_i (m, m) and C_i (n, n) positive semidefinite

1. constant: A, B, C do not depend on W. A fixed basis and bases refreshed every T steps, by `ProjectedOptimizer`.
2. stable_rank: the same matrices, full-rank SGD, and Lemma 3.3's bound on the stable rank.
3. counterexample: a 1 x 1 weight to which Theorem 3.8 applies as printed, and which does not do what it says.
4. network: two layers without bias, leaky ReLU (or nothing) between them, squared loss, both layers projected. It is reversible,
   so its gradients have that form with B_i = J_i^T J_i and C_i = f_i f_i^T, which change as it learns.

What is tested is the paper's recursion before it is estimated. With R_t = P^T G_t, S_t = 1/N sum_i C_i (x) P^T B_i P and E_t what
A, B and C changed of the gradient at W_t,

    ||R_t|| <= [1 - eta (lambda_min(S_{t-1}) - L_t)] ||R_{t-1}||,    L_t = ||P^T E_t|| / (eta ||R_{t-1}||)

for eta lambda_max(S) <= 1. The paper bounds lambda_min(S) from below by kappa = 1/N sum_i lambda_min(P^T B_i P) lambda_min(C_i),
and L_t from above by L_A + L_B L_C D^2. Everything is fp64. Writes results.json, reversible_network.png and the tables of
README.md.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from subspan.optim.optimizer import ProjectedOptimizer
from subspan.optim.projectors import SVD, project, project_back
from subspan.optim.refresh import Refresh
from subspan.optim.rules import SGDMomentum

HERE = Path(__file__).parent
NEVER = 10**9  # T of a basis that is kept

M, N, RANK = 16, 24, 4  # of the weight, (M, N), and its basis, on the left
SAMPLES = 8  # of the constant case
STEPS, GAPS = 3000, (10, 100, 1000, NEVER)
KAPPA_EVERY = 50  # steps: kappa takes hundreds of small decompositions
CHECKED = 50  # steps of Lemma 3.3 that the optimizer takes itself
LR = 0.02  # of the network
OUT, DATA, SLOPE = 8, 128, 0.1  # outputs, examples and leaky slope of the network
TOLERANCE = 1e-9  # of a comparison, relative: rounding
CONVERGED = 1e-12  # share of the first R under which its norm is rounding


def gram(*shape: int, generator: torch.Generator) -> Tensor:
    """Positive definite (..., d, d) with eigenvalues spread over about two decades, the largest about 1."""
    X = torch.randn(*shape, shape[-1], generator=generator, dtype=torch.float64)
    return X @ X.mT / (4 * shape[-1]) + 0.01 * torch.eye(shape[-1], dtype=torch.float64)


@dataclass
class Form:
    """A, B, C of one weight at one moment. G(W) = 1/N sum_i (A_i - B_i W C_i)."""

    A: Tensor  # (m, n), the mean
    B: Tensor  # (N, m, m)
    C: Tensor  # (N, n, n)

    def gradient(self, W: Tensor) -> Tensor:
        return self.A - torch.einsum("iab,bc,icd->ad", self.B, W, self.C) / len(self.B)

    def operator(self, P: Tensor) -> Tensor:
        """S (n r, n r), seen through a basis P (m, r)."""
        B = P.mT @ self.B @ P
        S = torch.einsum("iab,icd->acbd", self.C, B) / len(B)
        return S.reshape(S.shape[0] * S.shape[1], -1)

    def kappa(self, P: Tensor) -> float:
        smallest = [torch.linalg.eigvalsh(X)[:, 0].clamp_min(0) for X in (P.mT @ self.B @ P, self.C)]
        return float((smallest[0] * smallest[1]).mean())


def constant(generator: torch.Generator, samples: int = SAMPLES) -> Form:
    A = torch.randn(M, N, generator=generator, dtype=torch.float64)
    return Form(A, gram(samples, M, generator=generator), gram(samples, N, generator=generator))


def galore(weights: list[nn.Parameter], lr: float, gap: int, rank: int = RANK) -> ProjectedOptimizer:
    """GaLore with rho = 1: plain SGD in the basis, scale 1, bases from the exact SVD of the gradient at steps 0, T, 2T, ..."""
    group = {"params": weights, "rank": rank, "update_proj_gap": gap, "scale": 1.0, "proj_type": "left"}
    return ProjectedOptimizer(
        [group], lr, rule=SGDMomentum(0), projector=SVD(), refresh=Refresh(first="gradient"), mask_null=False
    )


@dataclass
class Contraction:
    """Compares every step in a basis that is kept with what the recursion allows."""

    lr: float
    steps: int = 0
    broken: int = 0
    premise: int = 0  # steps at which the bound is a contraction at all
    kappa: list[float] = field(default_factory=list)
    smallest: list[float] = field(default_factory=list)
    drift: list[float] = field(default_factory=list)
    bound: float = math.nan
    start: float = math.nan
    end: float = math.nan
    _last: tuple[Tensor, Form, float] | None = None

    def look(self, W: Tensor, P: Tensor, form: Form) -> None:
        G = form.gradient(W)
        R = project(G, P)
        self.end = float(R.norm())
        if self._last is None:
            self.bound = self.start = self.end
        elif self._last[0].norm() > CONVERGED * self.start:
            R_old, old, smallest = self._last
            E = project(G - old.gradient(W), P)  # what changed of the gradient at one and the same W
            drift = float(E.norm() / R_old.norm()) / self.lr
            factor = 1 - self.lr * (smallest - drift)
            ratio = self.end / float(R_old.norm())
            self.steps += 1
            self.broken += ratio > factor * (1 + TOLERANCE)
            self.premise += drift < smallest
            self.drift.append(drift)
            self.bound *= factor
        else:
            self.bound = math.nan
        eigenvalues = torch.linalg.eigvalsh(form.operator(P))
        assert self.lr * float(eigenvalues[-1]) <= 1, "the step is too long for the bound"
        self.smallest.append(float(eigenvalues[0]))
        if not len(self.smallest) % KAPPA_EVERY or not self.kappa:
            self.kappa.append(form.kappa(P))
        self._last = (R, form, self.smallest[-1])


def constant_case(gap: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    form = constant(generator)
    whole = torch.eye(M, dtype=torch.float64)
    S = form.operator(whole)
    lr = 1 / float(torch.linalg.eigvalsh(S)[-1])
    W = nn.Parameter(torch.randn(M, N, generator=generator, dtype=torch.float64))
    best = torch.linalg.solve(S, form.A.mT.reshape(-1)).reshape(N, M).mT  # S acts on vec(W), column by column

    def loss(W: Tensor) -> float:
        D = W - best
        return float((D * (form.A - form.gradient(D))).sum()) / 2

    optimizer, check, curve = galore([W], lr, gap), Contraction(lr), []
    start = loss(W.detach())
    for step in range(STEPS):
        W.grad = -form.gradient(W.detach())
        G, before = -W.grad, W.detach().clone()
        optimizer.step()
        P = optimizer.basis(W, torch.float64)
        if gap == NEVER:
            check.look(before, P, form)
        R = project(G, P)
        outside = float((G - project_back(R, P)).norm())
        curve.append([step, float(G.norm()), float(R.norm()), outside, loss(before) / start, check.bound])
    return {
        "curve": curve,
        "loss": loss(W.detach()) / start,
        "lr": lr,
        "check": summary(check) if check.steps else None,
    }


def summary(check: Contraction) -> dict[str, Any]:
    return {
        "steps": check.steps,
        "broken": check.broken,
        "premise": check.premise,
        "kappa": [min(check.kappa), max(check.kappa)],
        "smallest": [min(check.smallest), max(check.smallest)],
        "drift": [min(check.drift), statistics.median(check.drift), max(check.drift)],
        "left": check.end / check.start,
    }


def stable_rank(G: Tensor) -> float:
    return float(G.square().sum() / torch.linalg.matrix_norm(G, 2).square())


def stable_rank_case(samples: int) -> dict[str, Any]:
    """Lemma 3.3, with t0 = 0: full-rank SGD on the constant form, in closed form, g_t = (I - eta S)^t g_0, at any t.

    The optimizer's own steps must give the same g_t, for as long as they are taken.
    """
    generator = torch.Generator().manual_seed(1)
    form = constant(generator, samples)
    values, vectors = torch.linalg.eigh(form.operator(torch.eye(M, dtype=torch.float64)))
    lr = 1 / float(values[-1])
    W = nn.Parameter(torch.randn(M, N, generator=generator, dtype=torch.float64))
    optimizer = ProjectedOptimizer([W], lr, rule=SGDMomentum(0))
    parts = vectors.mT @ form.gradient(W.detach()).mT.reshape(-1)  # of g_0, one an eigenvector

    def at(step: float) -> tuple[Tensor, float]:
        """G_t over (1 - eta lambda_1)^t, which stable ranks do not see, and log10 of what is left of the gradient."""
        decay = step * ((-lr * values).log1p() - (-lr * values[0]).log1p()).nan_to_num(neginf=-1e9)
        G = (vectors @ (parts * decay.exp())).reshape(N, M).mT
        scale = step * math.log10(1 - lr * float(values[0]))
        return G, scale + math.log10(float(G.norm() / parts.norm()))

    for _ in range(CHECKED):
        W.grad = -form.gradient(W.detach())
        optimizer.step()
    G, left = at(CHECKED)
    stepped = form.gradient(W.detach())
    G *= 10**left * float(parts.norm()) / float(G.norm())
    error = float((stepped - G).norm() / G.norm())

    parallel = (vectors[:, 0] * parts[0]).reshape(N, M).mT  # the smallest eigenvalue is simple
    limit = stable_rank(parallel)
    rate = math.log1p(-lr * float(values[1])) - math.log1p(-lr * float(values[0]))
    rest = float(parts[1:].square().sum() / torch.linalg.matrix_norm(parallel, 2).square())
    curve, broken = [], 0
    for step in (0.0, *torch.logspace(0, 8, 161, dtype=torch.float64).floor().tolist()):
        G, left = at(step)
        sr, bound = stable_rank(G), limit + math.exp(2 * step * rate) * rest
        broken += sr > bound * (1 + 1e-6)
        curve.append([step, sr, bound, left])
        if bound < 1.01 * limit:
            break
    far = [abs(math.log(row[1] / limit)) > math.log(1.1) for row in curve]
    near = curve[max((i + 1 for i, is_far in enumerate(far) if is_far), default=0)]
    return {
        "curve": curve,
        "points": len(curve),
        "broken": broken,
        "limit": limit,
        "start": curve[0][1],
        "hundredth": next(row[1] for row in curve if row[3] < -2),
        "near": near[0],
        "left": near[3],
        "error": error,
    }


def counterexample() -> dict[str, Any]:
    """m = n = N = 1: G = a - (1 - w) w. A = a and C = 1 are constant (L_A = L_C = 0); B = 1 - w has L_B = 1 and is positive for
    |w| <= 0.9 = D.

    L_A + L_B L_C D^2 = 0 and kappa = 1 - w > 0.1: as printed, R must shrink in every step.
    """
    lr, a = 0.1, 0.22
    w = torch.tensor([[0.7]], dtype=torch.float64)
    curve: list[list[float]] = []
    broken = repaired_broken = 0
    while float(w) <= 0.9:
        R, kappa = a - (1 - float(w)) * float(w), 1 - float(w)
        if curve:
            broken += abs(R) > (1 - lr * curve[-1][2]) * abs(curve[-1][1])
            # L_A + D (L_B ||C|| + L_C ||B||) = 0.9 in place of L_A + L_B L_C D^2
            repaired_broken += abs(R) > (1 - lr * (curve[-1][2] - 0.9)) * abs(curve[-1][1])
        curve.append([float(w), R, kappa])
        w += lr * R
    return {
        "steps": len(curve) - 1,
        "broken": broken,
        "repaired_broken": repaired_broken,
        "start": curve[0][1],
        "end": curve[-1][1],
    }


class Network(nn.Module):
    def __init__(self, generator: torch.Generator, slope: float) -> None:
        super().__init__()
        self.slope = slope

        def weight(m: int, n: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(m, n, generator=generator, dtype=torch.float64) * (2 / n) ** 0.5)

        self.first, self.second = weight(M, N), weight(OUT, M)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.leaky_relu(x @ self.first.mT, self.slope) @ self.second.mT

    @torch.no_grad()
    def forms(self, x: Tensor, y: Tensor) -> list[Form]:
        """Of both layers: J is what follows the weight, f what comes into it; A = J^T y f^T, B = J^T J, C = f f^T."""
        z = x @ self.first.mT
        slopes = self.slope + (1 - self.slope) * (z > 0).to(z.dtype)
        forms = []
        for J, f in (
            (self.second * slopes.unsqueeze(1), x),
            (torch.eye(OUT, dtype=x.dtype).expand(len(x), -1, -1), z * slopes),
        ):
            A = torch.einsum("iab,ia,ic->bc", J, y, f) / len(x)
            forms.append(Form(A, J.mT @ J, f.unsqueeze(2) * f.unsqueeze(1)))
        return forms


def network_case(gap: int, *, rank: int = RANK, slope: float = SLOPE, both: bool = True) -> dict[str, Any]:
    """Train both layers or the first one alone; with a basis that is kept, every step is compared with the theory."""
    look, lr = gap == NEVER and rank == RANK, LR
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(DATA, N, generator=generator, dtype=torch.float64)
    y = Network(generator, slope)(x).detach()  # of a teacher, so that a loss of zero can be reached
    model = Network(generator, slope)
    weights = [model.first, model.second] if both else [model.first]
    optimizer = galore(weights, lr, gap, rank)
    checks, curve, form_error = [Contraction(lr) for _ in weights], [], 0.0
    for step in range(STEPS):
        loss = (y - model(x)).square().sum() / (2 * DATA)
        loss.backward()
        gradients = [-p.grad.clone() for p in weights if p.grad is not None]
        before = [p.detach().clone() for p in weights]
        forms = model.forms(x, y)[: len(weights)] if look else []
        optimizer.step()
        bases = [optimizer.basis(p, torch.float64) for p in weights]
        for W, P, G, form, check in zip(before, bases, gradients, forms, checks, strict=look):
            form_error = max(form_error, float((form.gradient(W) - G).norm() / G.norm()))
            check.look(W, P, form)
        inside = [project(G, P) for G, P in zip(gradients, bases, strict=True)]
        norms = [float(torch.stack([X.norm() for X in parts]).norm()) for parts in (gradients, inside)]
        if step % 10 == 0:
            curve.append([step, *norms, loss.item()])
        optimizer.zero_grad()
    final = float((y - model(x)).detach().square().sum() / (2 * DATA))
    gradient = max(row[1] for row in curve[-10:])
    result = {"curve": curve, "loss": [curve[0][3], final], "gradient": [curve[0][1], gradient]}
    if look:
        result |= {"form_error": form_error, "checks": [summary(check) for check in checks]}
    return result


# ------------------------------------------------------------------------------------------------------- report


def label(gap: int) -> str:
    return "never" if gap == NEVER else str(gap)


def range_of(values: list[float]) -> str:
    return " to ".join(dict.fromkeys(f"{value:.2g}" for value in values))


def constant_table(results: dict[str, Any]) -> str:
    lines = [
        f"| T | G, step 0 | inside the basis, step {STEPS - 1} | outside, step 0 | outside, step {STEPS - 1} "
        "| loss above the minimum, of that at step 0 |",
        "|---|---|---|---|---|---|",
    ]
    for gap in GAPS:
        run = results["constant"][label(gap)]
        first, last = run["curve"][0], run["curve"][-1]
        lines.append(
            f"| {label(gap)} | {first[1]:.3f} | {last[2]:.1e} | {first[3]:.3f} | {last[3]:.1e} | {run['loss']:.1e} |"
        )
    return "\n".join(lines)


def contraction_table(results: dict[str, Any]) -> str:
    rows = [("constant A, B, C", results["constant"]["never"]["check"])]
    for name, run in (("linear network", results["linear"]), ("leaky network", results["network"]["never"])):
        pairs = zip(("first", "second"), run["checks"], strict=True)
        rows += [(f"{name}, {layer} layer", check) for layer, check in pairs]
    rows += [("leaky network, first layer, the second does not learn", results["first_alone"]["checks"][0])]
    lines = [
        "| | steps | over the bound | kappa | lambda_min(S) | L: smallest, median, largest | steps with L < lambda_min(S) "
        "| R at the end, of that at step 0 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, check in rows:
        drift = ", ".join(dict.fromkeys(f"{value:.2g}" for value in check["drift"]))
        ranges = " | ".join(range_of(check[key]) for key in ("kappa", "smallest"))
        counts = f"{check['steps']} | {check['broken']}"
        lines.append(f"| {name} | {counts} | {ranges} | {drift} | {check['premise']} | {check['left']:.1e} |")
    return "\n".join(lines)


def stable_rank_table(results: dict[str, Any]) -> str:
    lines = [
        "| N | over the bound | stable rank, step 0 | where a hundredth of the gradient is left | limit: the parallel part's "
        "| within 10 % of it at step | gradient left there |",
        "|---|---|---|---|---|---|---|",
    ]
    for samples, run in results["stable_rank"].items():
        numbers = " | ".join(f"{run[key]:.2f}" for key in ("start", "hundredth", "limit"))
        lines.append(
            f"| {samples} | {run['broken']} of {run['points']} | {numbers} | {run['near']:,.0f} | 10^{run['left']:.0f} |"
        )
    return "\n".join(lines)


def network_table(results: dict[str, Any]) -> str:
    lines = ["| T | loss, start | loss, end | norm of the gradient, start | end |", "|---|---|---|---|---|"]
    for gap, run in {**results["network"], "full rank": results["full_rank"]}.items():
        loss, gradient = run["loss"], run["gradient"]
        lines.append(f"| {gap} | {loss[0]:.3f} | {loss[1]:.2e} | {gradient[0]:.3f} | {gradient[1]:.1e} |")
    return "\n".join(lines)


def draw(results: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4))
    steps, _, inside, outside, _, bound = zip(*results["constant"]["never"]["curve"], strict=True)
    for values, style, name in (
        (bound, "k:", "bound on R"),
        (inside, "C0", "R, fixed basis"),
        (outside, "C1", "outside of it"),
    ):
        left.plot(steps, values, style, label=name)
    left.plot(steps, [row[1] for row in results["constant"]["100"]["curve"]], "C2", label="G, T = 100")
    left.set(title="constant A, B, C", xlabel="step", ylabel="norm", yscale="log")
    for samples, run in results["stable_rank"].items():
        steps, rank, bound, _ = zip(*run["curve"], strict=True)
        line = middle.plot(steps, rank, label=f"N = {samples}")[0]
        middle.plot(steps, bound, ":", color=line.get_color(), label="its bound")
    middle.set(title="stable rank of G, full-rank SGD", xlabel="step", xscale="symlog", ylim=(0.9, 20), yscale="log")
    for gap, run in results["network"].items():
        right.plot([row[0] for row in run["curve"]], [row[1] for row in run["curve"]], label=f"T = {gap}")
    right.set(title="network", xlabel="step", ylabel="norm of the gradient", yscale="log")
    for axis in (left, middle, right):
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(HERE / "reversible_network.png", dpi=80)


def main(threads: int = 1) -> None:
    """Run all four parts, write results.json, the figure and the tables.

    Args:
        threads: CPU threads
    """
    torch.set_num_threads(threads)
    begin = time.perf_counter()

    def part(name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        start = time.perf_counter()
        result = run()
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        return result

    results: dict[str, Any] = {
        "constant": {label(gap): part(f"constant, T {label(gap)}", lambda gap=gap: constant_case(gap)) for gap in GAPS},
        "stable_rank": {str(n): part(f"stable rank, N {n}", lambda n=n: stable_rank_case(n)) for n in (1, SAMPLES)},
        "counterexample": counterexample(),
        "network": {label(gap): part(f"network, T {label(gap)}", lambda gap=gap: network_case(gap)) for gap in GAPS},
        "full_rank": part("network, full rank", lambda: network_case(NEVER, rank=M)),
        "linear": part("linear network", lambda: network_case(NEVER, slope=1.0)),
        "first_alone": part("network, first layer alone", lambda: network_case(NEVER, both=False)),
    }
    print(json.dumps(results["counterexample"]))
    print(f"form of the network's gradients: relative error {results['network']['never']['form_error']:.1e}")
    path = HERE / "README.md"
    text = path.read_text()
    for name, table in (
        ("contraction", contraction_table(results)),
        ("constant", constant_table(results)),
        ("network", network_table(results)),
        ("stable rank", stable_rank_table(results)),
    ):
        print(table)
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.S
        )
    path.write_text(text)
    draw(results)
    runs = (run for name in ("constant", "stable_rank", "network") for run in results[name].values())
    for run in (*runs, *(results[name] for name in ("full_rank", "linear", "first_alone"))):
        del run["curve"]  # the figure has it
    versions = {"torch": torch.__version__, "seconds": round(time.perf_counter() - begin)}
    (HERE / "results.json").write_text(json.dumps({**results, **versions}, indent=1) + "\n")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
