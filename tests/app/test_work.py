"""The pool of threads: bounded, and honest about being full."""

import asyncio
import threading

import pytest

from app.problems import Problem
from app.work import Pool


def test_more_work_than_fits_is_refused_and_finished_work_makes_room() -> None:
    async def scenario() -> None:
        pool, gate = Pool("test", threads=1, queue=1), threading.Event()
        accepted = [asyncio.create_task(pool.run(lambda: gate.wait(10))) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Problem, match="try again") as caught:
            await pool.run(lambda: True)
        assert (caught.value.status, caught.value.headers) == (503, {"Retry-After": "2"})
        gate.set()
        assert await asyncio.gather(*accepted) == [True, True]
        await asyncio.sleep(0.05)
        assert await pool.run(lambda: "room") == "room"
        pool.close()

    asyncio.run(scenario())


def test_errors_of_the_work_come_back() -> None:
    def fail() -> None:
        raise KeyError("x")

    async def scenario() -> None:
        pool = Pool("test", threads=1, queue=0)
        for _ in range(3):
            with pytest.raises(KeyError):
                await pool.run(fail)
            await asyncio.sleep(0.01)
        pool.close()

    asyncio.run(scenario())
