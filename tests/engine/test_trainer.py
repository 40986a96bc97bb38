import pytest
import torch
from torch import nn
from toy_detectors import make_resumable, make_trainer

from cascade_det.engine.hooks import EvalHook, Hook
from cascade_det.engine.solver import build_gradient_clipper, build_optimizer


def state_of(detector):
    return {name: tensor.clone() for name, tensor in detector.state_dict().items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)


class Record(Hook):
    def __init__(self, calls, name, fail_at=None):
        self.calls, self.name, self.fail_at = calls, name, fail_at

    def before_train(self, trainer):
        self.calls.append((self.name, "before", trainer.iteration))

    def after_step(self, trainer):
        self.calls.append((self.name, "step", trainer.iteration))
        if trainer.iteration == self.fail_at:
            raise RuntimeError("step failed")

    def after_train(self, trainer):
        self.calls.append((self.name, "after", trainer.iteration))
        if self.fail_at == "end":
            raise RuntimeError("end failed")


def test_equals_a_loop_written_out(make_detector, make_loader):
    trained = make_detector()
    torch.manual_seed(3)
    make_trainer(
        trained,
        make_loader(),
        clip_gradients=build_gradient_clipper({"type": "full_model", "value": 0.5}),
    ).train()

    detector = make_detector().train()
    torch.manual_seed(3)
    optimizer = build_optimizer(detector, base_lr=0.05)
    for i, batch in zip(range(8), make_loader(), strict=False):
        warmup = 0.001 + 0.999 * i / 3 if i < 3 else 1
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * warmup * (0.1 if i >= 5 else 1)
        optimizer.zero_grad()
        sum(detector(batch).values()).backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 0.5)
        optimizer.step()
    for name, tensor in detector.state_dict().items():
        torch.testing.assert_close(trained.state_dict()[name], tensor, rtol=1e-5, atol=1e-7)


def test_history_holds_losses_metrics_and_times(make_detector, make_loader):
    trainer = make_trainer(make_detector(), make_loader())
    trainer.train()
    history = trainer.history
    names = {"total_loss", "loss_square", "loss_abs", "toy/error", "lr", "time", "data_time"}
    names.add("gradient_norm")
    assert set(history) == names
    assert all(history.latest(name)[1] == 7 for name in names)
    parts = history.latest("loss_square")[0] + history.latest("loss_abs")[0]
    assert history.latest("total_loss")[0] == pytest.approx(parts, rel=1e-6)
    assert history.latest("lr")[0] == pytest.approx(0.005)
    assert 0 <= history.latest("data_time")[0] <= history.latest("time")[0]


def test_hooks_are_called_in_order(make_detector, make_loader):
    calls = []
    trainer = make_trainer(
        make_detector(), make_loader(), max_iter=2, hooks=[Record(calls, "a"), Record(calls, "b")]
    )
    trainer.train()
    assert calls == [
        ("a", "before", -1),
        ("b", "before", -1),
        ("a", "step", 0),
        ("b", "step", 0),
        ("a", "step", 1),
        ("b", "step", 1),
        ("a", "after", 1),
        ("b", "after", 1),
    ]
    assert trainer.finished


def test_every_hook_gets_its_end_after_an_error(make_detector, make_loader):
    calls = []
    hooks = [Record(calls, "a", fail_at="end"), Record(calls, "b", fail_at=1), Record(calls, "c")]
    trainer = make_trainer(make_detector(), make_loader(), hooks=hooks)
    with pytest.raises(RuntimeError, match="end failed") as caught:
        trainer.train()
    assert "step failed" in str(caught.value.__context__)
    assert [call[:2] for call in calls[-3:]] == [("a", "after"), ("b", "after"), ("c", "after")]
    assert not trainer.finished


def test_loader_that_ends_is_an_error(make_detector, make_loader):
    batches = [batch for batch, _ in zip(make_loader(), range(3), strict=False)]
    with pytest.raises(RuntimeError, match="ended before iteration 3"):
        make_trainer(make_detector(), batches).train()


class Shuffling:
    """Draws from the global generator when it is started, as DataLoader does."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        torch.rand(())
        return iter(self.loader)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("stop_at", [1, 4, 7])
def test_resumed_run_equals_uninterrupted_one(
    make_detector, make_loader, tmp_path, optimizer, stop_at
):
    def run(folder, *, resume=False, hooks=()):
        trainer = make_resumable(
            folder,
            make_detector(),
            lambda start: Shuffling(make_loader(start)),
            name=optimizer,
            resume=resume,
            period=1,
            hooks=lambda _: hooks,
        )
        trainer.train()
        return trainer

    torch.manual_seed(5)
    whole = run(tmp_path / "whole")

    torch.manual_seed(5)
    with pytest.raises(RuntimeError, match="step failed"):
        run(tmp_path / "cut", hooks=[Record([], "x", fail_at=stop_at)])
    torch.manual_seed(99)  # a new process has other random numbers
    resumed = run(tmp_path / "cut", resume=True)

    assert resumed.start_iter == stop_at + 1
    assert_equal(state_of(resumed.detector), state_of(whole.detector))
    final = [torch.load(tmp_path / d / "model_final.pth") for d in ("whole", "cut")]
    for one, other in zip(
        *(f["trainer"]["optimizer"]["state"].values() for f in final), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    for name in ("total_loss", "loss_abs", "lr"):
        assert resumed.history.latest(name) == whole.history.latest(name)
        assert resumed.history.median(name) == whole.history.median(name)
    torch.testing.assert_close(
        final[1]["trainer"]["random"], final[0]["trainer"]["random"], rtol=0, atol=0
    )


def test_run_that_is_done_trains_nothing_and_evaluates(make_detector, make_loader, tmp_path):
    for resume in (False, True):
        detector, evaluations = make_detector(), []
        hook = EvalHook(0, lambda evaluations=evaluations: evaluations.append(1) or {"a": 1.0})
        trainer = make_resumable(
            tmp_path, detector, make_loader, resume=resume, hooks=lambda _, hook=hook: [hook]
        )
        before = state_of(detector)
        trainer.train()
        assert evaluations == [1]
        assert trainer.results == {"a": 1.0}
    assert trainer.start_iter == 8
    assert_equal(state_of(detector), before)


def test_old_checkpoints_are_deleted_also_those_of_the_run_before(
    make_detector, make_loader, tmp_path
):
    def run(until, resume):
        make_resumable(
            tmp_path,
            make_detector(),
            make_loader,
            resume=resume,
            period=2,
            max_to_keep=2,
            max_iter=until,
        ).train()
        return sorted(path.name for path in tmp_path.glob("*.pth"))

    (tmp_path / "model_best.pth").touch()
    assert run(7, False) == [
        "model_0000003.pth",
        "model_0000005.pth",
        "model_best.pth",
        "model_final.pth",
    ]
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert run(11, True) == [
        "model_0000007.pth",
        "model_0000009.pth",
        "model_best.pth",
        "model_final.pth",
    ]


@pytest.mark.parametrize(
    ("period", "max_iter", "evaluated"),
    [(0, 6, [5]), (2, 6, [1, 3, 5]), (4, 6, [3, 5]), (6, 6, [5]), (100, 6, [5])],
)
def test_evaluations_at_the_period_and_the_end_never_twice(
    make_detector, make_loader, period, max_iter, evaluated
):
    found = []

    def evaluate():
        found.append(trainer.iteration)
        torch.rand(3)
        return {"bbox": {"AP": float(len(found)), "text": "x", "per_class": {"dog": 1}}, "n": True}

    detector = make_detector()
    trainer = make_trainer(
        detector, make_loader(), max_iter=max_iter, hooks=[EvalHook(period, evaluate)]
    )
    torch.manual_seed(0)
    trainer.train()
    assert found == evaluated
    assert trainer.history.latest("bbox/AP") == (len(found), max_iter - 1)
    assert trainer.history.latest("bbox/per_class/dog") == (1.0, max_iter - 1)
    assert "n" not in trainer.history
    assert "bbox/text" not in trainer.history

    # Evaluation, which draws random numbers too, changes nothing in training.
    alone = make_detector()
    torch.manual_seed(0)
    make_trainer(alone, make_loader(), max_iter=max_iter).train()
    assert_equal(state_of(detector), state_of(alone))


def test_no_evaluation_after_an_error(make_detector, make_loader):
    hooks = [Record([], "x", fail_at=3), EvalHook(0, lambda: pytest.fail("evaluated"))]
    with pytest.raises(RuntimeError, match="step failed"):
        make_trainer(make_detector(), make_loader(), hooks=hooks).train()


def test_mixed_precision_computes_in_its_type_and_keeps_float32_weights(make_detector, make_loader):
    seen = []
    detector = make_detector()
    detector.head.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    trainer = make_trainer(detector, make_loader(), amp_dtype=torch.bfloat16)
    trainer.train()
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in detector.parameters())
    plain = make_detector()
    make_trainer(plain, make_loader()).train()
    assert not torch.equal(detector.head.weight, plain.head.weight)


def test_training_mode_is_set(make_detector, make_loader):
    detector = make_detector().eval()
    make_trainer(detector, make_loader(), max_iter=1).train()
    assert detector.training


def test_metrics_inside_a_wrapper_are_found(make_detector, make_loader):
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, batch):
            return self.module(batch)

    trainer = make_trainer(Wrapper(make_detector()), make_loader(), max_iter=1)
    trainer.train()
    assert "toy/error" in trainer.history


def test_scaled_loss_changes_nothing_but_the_range(make_detector, make_loader):
    """Scaling by a power of two is exact, if gradients are unscaled before they are clipped."""

    def run(scaled):
        detector = make_detector()
        clip = build_gradient_clipper({"type": "full_model", "value": 0.5})
        trainer = make_trainer(detector, make_loader(), clip_gradients=clip)
        if scaled:  # the CPU's scaler stands in for the GPU's
            trainer.step._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        torch.manual_seed(0)
        trainer.train()
        return trainer

    plain, scaled = run(False), run(True)
    assert_equal(state_of(scaled.detector), state_of(plain.detector))
    assert plain.state_dict()["scaler"] == {}
    again = run(True)
    state = scaled.state_dict()
    state["scaler"]["scale"] = 64.0
    again.load_state_dict(state)
    assert again.state_dict()["scaler"]["scale"] == 64.0
    plain.load_state_dict(state)  # a run in another precision has no use for it
    assert plain.state_dict()["scaler"] == {}


def test_last_evaluation_comes_after_all_hooks_of_the_last_step(make_detector, make_loader):
    calls = []
    hooks = [EvalHook(1, lambda: calls.append("evaluation") or {}), Record(calls, "x")]
    make_trainer(make_detector(), make_loader(), max_iter=2, hooks=hooks).train()
    assert [call if call == "evaluation" else call[1] for call in calls] == [
        "before",
        "evaluation",
        "step",
        "step",
        "evaluation",
        "after",
    ]
