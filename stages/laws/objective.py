"""What a fit of L(N, D) = E + A / N^alpha + B / D^beta minimises, and how: two independent roads to the same minimum.

The objective is that of Hoffmann et al. 2022 (arXiv 2203.15556), Approach 3: the sum over runs of Huber(1e-3) of the
difference in log loss. It is flat and kinked, and an optimiser with default tolerances stops early: Besiroglu et al. 2024
(arXiv 2404.10102) trace the constants of the original paper to a mean in place of the sum. So here: the sum, rescaled by 1e6,
its analytic gradient, a hundred and more starts, each the best (E, A, B) for its pair of exponents, all improved at once by a
damped Gauss-Newton method, the best polished by another method. `project` gets there another way: variable projection (Golub and
Pereyra 1973), a search over the two exponents alone with the other three solved for at each step.

Letters: n runs, S starts or bootstrap draws, 5 parameters theta = (e, a, b, alpha, beta), where with x and y the centred logs
of N and D, log L = logsumexp(e, a - alpha x, b - beta y). Centring makes a and b independent enough to be fitted at all.
"""
import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Array = NDArray[np.float64]
DELTA = 1e-3  # Huber's threshold on log loss, Hoffmann et al. 2022, appendix D.3
SCALE = 1e6  # the objective's natural size is 1e-6 to 1e-3: below the default tolerances of any optimiser
EXPONENTS = (0.01, 2.0)  # bounds of alpha and beta
TERMS = (-12.0, 30.0)  # bounds of e, a, b: a term below 6e-6 nats is none
START_EXPONENTS = np.geomspace(0.05, 1.8, 12)  # 144 pairs


def log_loss(theta: Array, x: Array, y: Array) -> tuple[Array, Array]:
    """Log of the law (S, n) and its derivative by theta (S, n, 5). `theta` (S, 5); `x`, `y` (n,) centred logs."""
    e, a, b, alpha, beta = (theta[:, i, None] for i in range(5))
    terms = np.stack([np.broadcast_to(e, (len(theta), len(x))), a - alpha * x, b - beta * y], axis=-1)
    top = terms.max(axis=-1, keepdims=True)
    weights = np.exp(terms - top)
    total = weights.sum(axis=-1, keepdims=True)
    weights /= total
    size, data = weights[..., 1], weights[..., 2]
    return (top + np.log(total))[..., 0], np.stack([weights[..., 0], size, data, -x * size, -y * data], axis=-1)


def huber(residuals: Array, delta: float = DELTA) -> Array:
    """Huber's loss: r^2/2 up to delta, delta (|r| - delta/2) beyond (Huber 1964). Any shape."""
    size = np.abs(residuals)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


def objective(theta: Array, x: Array, y: Array, target: Array, weights: Array, delta: float = DELTA) -> tuple[float, Array]:
    """Weighted sum of Huber losses and its gradient, both times `SCALE`. `theta` (5,), `target` (n,) log losses, `weights` (n,)."""
    predicted, jacobian = log_loss(theta[None], x, y)
    residuals = predicted[0] - target
    return (float(SCALE * (weights * huber(residuals, delta)).sum()),
            SCALE * (weights * np.clip(residuals, -delta, delta)) @ jacobian[0])


def bounds_of(floor: float | None) -> Array:
    """(5, 2) lower and upper ends of theta; a known floor leaves e no room."""
    ends = np.array([TERMS] * 3 + [EXPONENTS] * 2)
    return ends if floor is None else np.vstack([np.full(2, math.log(floor)), ends[1:]])


def descend(theta: Array, x: Array, y: Array, target: Array, weights: Array, delta: float, steps: int,
            bounds: Array) -> tuple[Array, Array]:
    """All starts at once: reweighted Gauss-Newton steps, damped where they fail to descend (Levenberg-Marquardt).

    A Huber loss is bounded above by the quadratic with weight min(1, delta/|r|) that touches it, so minimising that one
    descends. `theta` (S, 5), `target` (n,) or (S, n), `weights` (n,), `bounds` (5, 2) or (S, 5, 2). Returns theta and the unscaled
    objective (S,).
    """
    low, high = bounds[..., 0], bounds[..., 1]
    free = np.broadcast_to(low < high, theta.shape)[:, None, :]  # a parameter without room has no slope either
    damping = np.full(len(theta), 1e-3)
    predicted, jacobian = log_loss(theta, x, y)
    residuals = predicted - target
    value = (weights * huber(residuals, delta)).sum(axis=1)
    diagonal = np.arange(5)
    for _ in range(steps):
        jacobian = jacobian * free
        weighted = jacobian * (weights * np.minimum(1.0, delta / np.maximum(np.abs(residuals), 1e-300)))[..., None]
        hessian = weighted.swapaxes(1, 2) @ jacobian
        slope = (weighted.swapaxes(1, 2) @ residuals[..., None])[..., 0]
        hessian[:, diagonal, diagonal] *= 1 + damping[:, None]
        hessian[:, diagonal, diagonal] += 1e-12
        proposal = (theta - np.linalg.solve(hessian, slope[..., None])[..., 0]).clip(low, high)
        predicted, new_jacobian = log_loss(proposal, x, y)
        new_residuals = predicted - target
        new_value = (weights * huber(new_residuals, delta)).sum(axis=1)
        better = new_value < value
        gain = float(np.max((value - new_value) / np.maximum(value, 1e-300), initial=0.0, where=better))
        theta = np.where(better[:, None], proposal, theta)
        jacobian = np.where(better[:, None, None], new_jacobian, jacobian)
        residuals = np.where(better[:, None], new_residuals, residuals)
        value = np.where(better, new_value, value)
        damping = np.where(better, damping / 3, damping * 4).clip(1e-9, 1e9)
        if gain < 1e-9 and (damping[~better] > 1e6).all():
            break
    return theta, value


def linear_starts(alpha: Array, beta: Array, x: Array, y: Array, loss: Array, weights: Array, floor: float | None) -> Array:
    """The best positive (E, A, B), or (A, B) on a known floor, of the relative least-squares problem at each pair of exponents: (S, 5)."""
    columns = np.stack([np.ones((len(alpha), len(x))), np.exp(-alpha[:, None] * x), np.exp(-beta[:, None] * y)], axis=-1)
    columns /= loss[:, None]  # relative errors, close to differences of logs
    wanted = np.ones(len(x))
    if floor is not None:
        columns, wanted = columns[..., 1:], wanted - floor / loss
    weighted = (columns * weights[:, None]).swapaxes(1, 2)
    gram = weighted @ columns + 1e-9 * np.eye(columns.shape[-1])
    linear = np.linalg.solve(gram, (weighted @ wanted)[..., None])[..., 0].clip(0.01 * loss.min(), None)
    if floor is not None:
        linear = np.column_stack([np.full(len(alpha), floor), linear])
    return np.column_stack([np.log(linear), alpha, beta])


def minimise(x: Array, y: Array, loss: Array, weights: Array, delta: float, floor: float | None) -> tuple[Array, float]:
    """theta and the unscaled objective of the best of all starts, polished."""
    target, bounds = np.log(loss), bounds_of(floor)
    alpha, beta = (grid.ravel() for grid in np.meshgrid(START_EXPONENTS, START_EXPONENTS))
    thetas = linear_starts(alpha, beta, x, y, loss, weights, floor)
    for steps, num_kept in ((15, 32), (45, 8), (200, 8)):  # the best go on
        thetas, values = descend(thetas, x, y, target, weights, delta, steps, bounds)
        order = np.argsort(values)[:num_kept]
        thetas, values = thetas[order], values[order]
    finished = [(float(values[0]), tuple(thetas[0]))]
    for theta in thetas[:3]:
        result = minimize(objective, theta, (x, y, target, weights, delta), jac=True, method="L-BFGS-B", bounds=bounds,
                          options={"maxiter": 2000, "maxfun": 4000, "ftol": 1e-15, "gtol": 1e-9})
        finished.append((float(result.fun) / SCALE, tuple(result.x)))
    value, theta = min(finished)
    return np.array(theta), value


def project(x: Array, y: Array, loss: Array, weights: Array, delta: float, floor: float | None) -> tuple[Array, float]:
    """theta and the unscaled objective by variable projection: a search over (alpha, beta), with e, a and b solved for at each pair.

    A grid of 144 pairs, then Nelder and Mead's simplex (1965), which needs no derivative and so shares no gradient with `minimise`.
    """
    target = np.log(loss)

    def solve(exponents: Array, starts: Array, steps: int) -> tuple[Array, Array]:
        pinned = np.broadcast_to(bounds_of(floor), (len(starts), 5, 2)).copy()
        pinned[:, 3:] = exponents[..., None]
        starts = np.column_stack([starts[:, :3], exponents])
        return descend(starts, x, y, target, weights, delta, steps, pinned)

    grid = np.stack(np.meshgrid(START_EXPONENTS, START_EXPONENTS), axis=-1).reshape(-1, 2)
    thetas, values = solve(grid, linear_starts(grid[:, 0], grid[:, 1], x, y, loss, weights, floor), 25)
    best = [thetas[values.argmin()], float(values.min())]

    def reduced(logs: Array) -> float:
        theta, value = solve(np.exp(np.clip(logs, *np.log(EXPONENTS)))[None], best[0][None], 40)
        if value[0] < best[1]:
            best[:] = [theta[0], float(value[0])]
        return SCALE * float(value[0])

    minimize(reduced, np.log(best[0][3:]), method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-7, "maxfev": 400})
    return best[0], best[1]
