"""The trainer: stops and goes on where it was, cools down by the clock, averages."""
import json

import pytest
import torch

from palimpsest.mini import optim


class Clock:
    """time.monotonic that moves when told."""

    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(optim.time, "monotonic", clock)
    # its leaps are slow steps, not a suspended process
    monkeypatch.setattr(optim, "PAUSE", float("inf"))
    return clock


def net(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Linear(3, 2)


def steps(trainer, count):
    generator = torch.Generator().manual_seed(trainer.step)
    going = True
    for _ in range(count):
        x = torch.randn(8, 3, generator=generator)
        going = trainer.update((trainer.module(x) - x[:, :2]).square().mean(), 8)
    return going


def test_a_stopped_run_resumes_with_its_counters_weights_and_moments(tmp_path, clock):
    first = optim.Trainer(net(), tmp_path, 10, 1e-2, seed=0)
    steps(first, 20)
    first.save()
    second = optim.Trainer(net(9), tmp_path, 10, 1e-2, seed=0)
    assert second.resume()
    assert (second.step, second.images) == (20, 160)
    for key in first.named:
        assert torch.equal(first.named[key], second.named[key])
        assert torch.equal(first.average[key], second.average[key])
    steps(first, 5)
    steps(second, 5)
    for key in first.named:
        assert torch.allclose(first.named[key], second.named[key], atol=1e-6), "the optimiser's moments came back too"


def test_there_is_nothing_to_resume_in_an_empty_folder(tmp_path):
    trainer = optim.Trainer(net(), tmp_path, 10, 1e-2, seed=0)
    assert not trainer.resume() and trainer.step == 0


def test_the_learning_rate_warms_up_holds_and_cools_down(tmp_path, clock):
    trainer = optim.Trainer(net(), tmp_path, 10, 1e-2, seed=0)

    def rate():
        steps(trainer, 1)
        return trainer.optimizer.param_groups[0]["lr"]

    assert rate() == pytest.approx(1e-2 / optim.WARMUP)
    trainer.step = optim.WARMUP
    assert rate() == pytest.approx(1e-2)
    clock.now += 600 * (1 - optim.COOLDOWN / 2)
    assert rate() == pytest.approx(0.5e-2)


def test_it_ends_when_the_minutes_are_used_up(tmp_path, clock):
    trainer = optim.Trainer(net(), tmp_path, 1, 1e-2, seed=0)
    assert steps(trainer, 3)
    clock.now += 61
    assert not steps(trainer, 1)


def test_a_suspended_process_keeps_its_minutes(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(optim, "PAUSE", 60.0)
    trainer = optim.Trainer(net(), tmp_path, 1, 1e-2, seed=0)
    steps(trainer, 1)
    clock.now += 1000
    assert steps(trainer, 1) and trainer.progress == 0.0
    clock.now += 59
    assert steps(trainer, 1) and trainer.progress > 0.9


def test_a_pause_inside_a_step_does_not_silence_the_reports(tmp_path, clock, monkeypatch):
    """Regression: a process stopped between the start of a step and its report wrote no line for as long again as it had been stopped."""
    monkeypatch.setattr(optim, "PAUSE", 60.0)
    trainer = optim.Trainer(net(), tmp_path, 10, 1e-2, seed=0)
    steps(trainer, 1)
    monkeypatch.setattr(trainer, "_skip_pause", lambda skip=trainer._skip_pause: (skip(), setattr(clock, "now", clock.now + 1000)))
    steps(trainer, 1)
    monkeypatch.undo()
    monkeypatch.setattr(optim.time, "monotonic", clock)
    lines = trainer.lines
    steps(trainer, 1)
    clock.now += 16
    steps(trainer, 1)
    assert trainer.lines == lines + 1 and trainer.progress < 0.1


def test_the_state_before_the_cool_down_is_kept_for_going_on(tmp_path, clock):
    trainer = optim.Trainer(net(), tmp_path, 10, 1e-2, seed=0)
    steps(trainer, 10)
    clock.now += 600 * (1 - optim.COOLDOWN) + 1
    steps(trainer, 1)
    assert json.loads((tmp_path / "state.json").read_text())["step"] == 10
    clock.now += 100
    steps(trainer, 30)
    assert json.loads((tmp_path / "state.json").read_text())["step"] == 10, "cooled weights are no place to go on from"


def test_the_average_follows_and_is_what_is_shipped(tmp_path, clock):
    trainer = optim.Trainer(net(), tmp_path, 10, 1e-1, seed=0, decay=0.9)
    start = {k: v.clone() for k, v in trainer.average.items()}
    steps(trainer, 30)
    averaged = trainer.averaged()
    assert averaged.keys() == trainer.module.state_dict().keys()
    for key in start:
        assert not torch.equal(averaged[key], start[key])
        assert not torch.equal(averaged[key], trainer.named[key])


def test_weights_without_gradient_do_not_stop_saving(tmp_path, clock):
    """Regression: the text projection has no gradient and so no moments, and saving the state failed."""
    module = torch.nn.ModuleDict({"used": net(), "unused": net(1)})
    trainer = optim.Trainer(module, tmp_path, 10, 1e-2, seed=0)
    trainer.update(module["used"](torch.ones(1, 3)).sum(), 1)
    trainer.save()
    assert optim.Trainer(module, tmp_path, 10, 1e-2, seed=0).resume()


def layers():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.Flatten(), torch.nn.Linear(8, 4))


def test_muon_moves_a_convolution_by_an_orthogonal_matrix_of_adamws_size(tmp_path, clock):
    module = layers()
    trainer = optim.Trainer(module, tmp_path, 10, 1e-2, seed=0, muon={"0.weight"})
    before = module[0].weight.detach().clone()
    trainer.step = optim.WARMUP
    trainer.update(module(torch.randn(16, 3, 3, 3)).square().sum(), 16)
    # weight decay takes lr * 0.01 of the weight first; the rest is U V^T at 0.2 sqrt(longer side)
    moved = (module[0].weight.detach() - before * (1 - 1e-4)).reshape(8, 27) / (1e-2 * 0.2 * 27**0.5)
    singular = torch.linalg.svdvals(moved)
    plain = torch.linalg.svdvals(module[0].weight.grad.reshape(8, 27))
    assert 0.7 < singular.max() < 1.3, "AdamW's size"
    assert plain.max() / plain.min() > 20 > 3 * singular.max() / singular.min(), "five iterations even the directions out"


def test_a_resumed_run_with_muon_goes_on_as_if_it_had_not_stopped(tmp_path, clock):
    def run(trainer, count):
        generator = torch.Generator().manual_seed(trainer.step)
        for _ in range(count):
            trainer.update(trainer.module(torch.randn(8, 3, 3, 3, generator=generator)).square().mean(), 8)

    first = optim.Trainer(layers(), tmp_path, 10, 1e-2, seed=0, muon={"0.weight"})
    run(first, 12)
    first.save()
    second = optim.Trainer(layers(), tmp_path, 10, 1e-2, seed=0, muon={"0.weight"})
    assert second.resume()
    run(first, 5)
    run(second, 5)
    for key in first.named:
        assert torch.allclose(first.named[key], second.named[key], atol=1e-6)


def test_the_rate_counts_the_images_of_this_call(tmp_path, clock, capsys):
    """Regression: after a change of the batch size, a resumed run reported the old size's rate."""
    trainer = optim.Trainer(net(), tmp_path, 10, 1e-2, seed=0)
    steps(trainer, 5)
    trainer.save()
    second = optim.Trainer(net(), tmp_path, 10, 1e-2, seed=0)
    second.resume()
    for _ in range(4):
        second.update(second.module(torch.ones(1, 3)).sum(), 32)
    clock.now += 2
    second.report()
    assert "64 images/s" in capsys.readouterr().out


def test_the_curve_is_logged(tmp_path, clock):
    trainer = optim.Trainer(net(), tmp_path, 10, 1e-2, seed=0)
    steps(trainer, 4)
    clock.now += 16
    steps(trainer, 1)
    step, images, loss = (tmp_path / "curve.csv").read_text().strip().split(",")
    assert (int(step), int(images)) == (5, 40) and float(loss) > 0


def test_a_report_right_after_a_report_says_nothing(tmp_path, clock):
    """Regression: where the last step had just reported, the report at the end divided by zero and the whole run was lost."""
    trainer = optim.Trainer(net(), tmp_path, 10, 1e-2, seed=0)
    clock.now += 16
    steps(trainer, 1)
    trainer.report()
    assert len((tmp_path / "curve.csv").read_text().splitlines()) == 1


def test_a_new_run_starts_a_new_curve_and_a_resumed_one_goes_on(tmp_path, clock):
    """Regression: --fresh left the old run's curve, and the new one was added to it."""
    def lines(resume):
        trainer = optim.Trainer(net(), tmp_path, 10, 1e-2, seed=0)
        if resume:
            assert trainer.resume()
        steps(trainer, 2)
        clock.now += 1
        trainer.report()
        trainer.save()
        return len((tmp_path / "curve.csv").read_text().splitlines())

    assert [lines(resume) for resume in (False, True, True, False)] == [1, 2, 3, 1]


def test_ctrl_c_saves_the_state_and_says_so(tmp_path, clock, capsys):
    """Regression: up to five minutes were lost."""
    trainer = optim.Trainer(net(), tmp_path, 10, 1e-2, seed=0)
    with pytest.raises(KeyboardInterrupt), trainer.saving():
        steps(trainer, 7)
        raise KeyboardInterrupt
    assert json.loads((tmp_path / "state.json").read_text())["step"] == 7
    assert "stopped at step 7: the state is saved" in capsys.readouterr().out


def test_ctrl_c_in_the_cool_down_keeps_the_state_from_before_it(tmp_path, clock, capsys):
    trainer = optim.Trainer(net(), tmp_path, 10, 1e-2, seed=0)
    with pytest.raises(KeyboardInterrupt), trainer.saving():
        steps(trainer, 7)
        clock.now += 600 * (1 - optim.COOLDOWN) + 1
        steps(trainer, 5)
        raise KeyboardInterrupt
    assert json.loads((tmp_path / "state.json").read_text())["step"] == 7
    assert "before the cool-down is kept" in capsys.readouterr().out


def test_the_record_names_what_made_the_weights(tmp_path, clock):
    trainer = optim.Trainer(net(), tmp_path, 10, 1e-2, seed=3)
    steps(trainer, 2)
    clock.now += 1
    trainer.report()
    record = trainer.record(batch=8)
    assert (record["seed"], record["steps"], record["images"], record["batch"], record["learning_rate"], record["device"]) == (3, 2, 16, 8, 1e-2, "cpu")
    assert record["final_loss"] > 0
