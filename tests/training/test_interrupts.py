"""Ctrl-C and SIGTERM by themselves: noted once, agreed on, and left alone where they are not ours."""

import os
import signal
import threading

import pytest
from transformers import TrainerControl

from draft_opd_trl.training.interrupts import StopSignals


BOTH = (signal.SIGINT, signal.SIGTERM)


def handlers():
    return [signal.getsignal(number) for number in BOTH]


def step_end(stop):
    return stop.on_step_end(None, None, TrainerControl())


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_ends_the_run_with_a_checkpoint_at_the_end_of_its_step(number, capfd):
    before = handlers()
    with StopSignals(lambda noted: noted, speaks=True) as stop:
        control = step_end(stop)
        assert stop.number == 0 and not control.should_training_stop and not control.should_save
        signal.raise_signal(number)
        control = step_end(stop)
        assert stop.number == number and control.should_training_stop and control.should_save
    assert handlers() == before
    assert capfd.readouterr().err.count(f"{signal.Signals(number).name}: stopping at the end of this step") == 1


def test_all_ranks_stop_where_one_was_told(capfd):
    told = []
    with StopSignals(lambda noted: told.append(noted) or signal.SIGTERM, speaks=False) as stop:
        assert step_end(stop).should_training_stop and stop.number == signal.SIGTERM
        signal.raise_signal(signal.SIGINT)
        step_end(stop)
    assert told == [0, signal.SIGINT] and capfd.readouterr().err == ""


def test_a_second_signal_does_what_it_did_before():
    with pytest.raises(KeyboardInterrupt), StopSignals(lambda noted: noted, speaks=False):
        signal.raise_signal(signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_is_ignored_stays_so():
    """As a shell does for what runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals(lambda noted: noted, speaks=False) as stop:
            signal.raise_signal(signal.SIGINT)
            assert not step_end(stop).should_training_stop
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_leave_signals_alone():
    seen, before = [], handlers()

    def look():
        with StopSignals(lambda noted: noted, speaks=False):
            seen.extend(handlers())

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == before
