"""Ranks that hold up the others: asleep, stopped, locked, waiting for what never comes, or in another collective."""

from __future__ import annotations

import multiprocessing
import os
import queue
import re
import signal
import socket
import sys
import threading
import time

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from situations.job import FAULT_STEP, Job, sick


@sick("hang", 1)
def asleep(job: Job) -> None:
    if job.is_culprit:
        time.sleep(600)


@sick("hang", 1, 2)
def two_asleep(job: Job) -> None:
    if job.rank > 0:
        time.sleep(600)


@sick("hang", 0)
def first_asleep(job: Job) -> None:
    if job.rank == 0:
        time.sleep(600)


@sick("hang", 3, world=4)
def asleep_in_a_subgroup(job: Job) -> None:
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    if job.rank == 3:
        time.sleep(600)
    dist.all_reduce(job.tensor, group=halves[job.rank // 2])


@sick("hang", 1)
def stopped(job: Job) -> None:
    if job.is_culprit:
        os.kill(os.getpid(), signal.SIGSTOP)


@sick("hang", 0, 1, 2)
def all_stopped(job: Job) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@sick("hang", 1)
def holding_the_gil(job: Job) -> None:
    if job.is_culprit:
        os.nice(19)  # it takes a core for as long as it lasts
        re.match(r"(a+)+$", "a" * 60 + "b")  # in C, for years


@sick("hang", 1)
def locked(job: Job) -> None:
    if job.is_culprit:
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()


@sick("hang", 0, 1, 2, within_s=16.0)
def all_locked(job: Job) -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


@sick("hang", 0, within_s=16.0, world=1)
def alone_and_locked(job: Job) -> None:
    threading.Lock().acquire()
    queue.Queue[int]().get()


@sick("hang", 1)
def waiting_for_an_event(job: Job) -> None:
    if job.is_culprit:
        threading.Event().wait()


@sick("hang", 1)
def waiting_for_a_queue(job: Job) -> None:
    if job.is_culprit:
        queue.Queue[int]().get()


@sick("hang", 1)
def waiting_for_another_process(job: Job) -> None:
    if job.is_culprit:
        multiprocessing.get_context("fork").SimpleQueue().get()


@sick("hang", 1)
def waiting_for_a_socket(job: Job) -> None:
    if job.is_culprit:
        ours, theirs = socket.socketpair()
        job.kept.append(theirs)
        ours.recv(1)


@sick("hang", 1)
def waiting_for_a_pipe(job: Job) -> None:
    if job.is_culprit:
        os.read(os.pipe()[0], 1)


@sick("mismatch", 1)
def operation(job: Job) -> None:
    if job.is_culprit:
        dist.broadcast(job.tensor, 0)
    else:
        dist.all_reduce(job.tensor)


@sick("mismatch", 1)
def size(job: Job) -> None:
    dist.all_reduce(torch.ones(1 << (12 if job.is_culprit else 10)))


@sick("mismatch", 1)
def barrier_of_one(job: Job) -> None:
    if job.is_culprit:
        dist.barrier()
    else:
        dist.all_reduce(job.tensor)


@sick("mismatch", 1)
def gather_of_one(job: Job) -> None:
    if job.is_culprit:
        dist.all_gather([torch.empty_like(job.tensor) for _ in range(job.world)], job.tensor)
    else:
        dist.all_reduce(job.tensor)


@sick("hang", 0, 1, 2)
def order(job: Job) -> None:
    groups = [job.first, job.second]
    for group in reversed(groups) if job.is_culprit else groups:
        dist.all_reduce(job.tensor, group=group)


@sick("hang", 0, 1, within_s=6.0)
def message_that_is_not_sent(job: Job) -> None:
    if job.rank == 0:
        dist.recv(job.tensor, 1)


class _Stalling(Dataset[int]):
    """Gives a batch a step, and then none for a long time."""

    def __init__(self, stalls: bool) -> None:
        self.stalls = stalls

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> int:
        if self.stalls and index >= FAULT_STEP:
            time.sleep(600)
        return index


def _loader(job: Job, stalls: bool) -> None:
    job.batches = iter(DataLoader(_Stalling(stalls), num_workers=1, prefetch_factor=2, batch_size=None))


@sick("data_stall", 1, before=lambda job: _loader(job, job.is_culprit))
def data_stall(job: Job) -> None:
    """Nothing here: the loader stalls by itself."""


@sick("data_stall", 0, 1, 2, within_s=75.0, before=lambda job: _loader(job, True))
def all_data_stalls(job: Job) -> None:
    """Nothing here: all loaders stall by themselves."""


@sick("left_early", 1)
def leaves(job: Job) -> None:
    if job.is_culprit:
        sys.exit(0)


@sick("left_early", 1, 2)
def two_leave(job: Job) -> None:
    if job.rank > 0:
        sys.exit(0)
