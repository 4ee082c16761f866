"""Checks for the verifier pool that hang, die, devour and chatter. Imported by its worker processes."""

import os
import time


def spin(payload):
    """Swallows the soft limit again and again; only a kill ends it."""
    end = time.monotonic() + payload["seconds"]
    while time.monotonic() < end:
        try:
            while time.monotonic() < end:
                pass
        except BaseException:
            pass
    return {}


def doze(payload):
    time.sleep(payload["seconds"])
    return {"pid": os.getpid()}


def toil(payload):
    """Takes CPU seconds, however busy the machine is."""
    end = time.process_time() + payload["seconds"]
    while time.process_time() < end:
        pass
    return {"pid": os.getpid()}


def die(_payload):
    os._exit(3)


def devour(_payload):
    return {"size": len(bytearray(3 * 2**30))}


def chatter(_payload):
    print("this must not land among the frames")  # noqa: T201
    return {"said": True}


def child_pid(_payload):
    return {"pid": os.getpid()}
