"""Logs of a serving process: one JSON object a line on standard error, which Ray keeps with the worker's other logs."""

from __future__ import annotations

import logging
import sys

import structlog


def configure_logs() -> None:
    """Write this process's structlog events as JSON; no line has a request's content."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
