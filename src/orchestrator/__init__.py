"""The work engine behind a web-crawling platform: triggers, fans out, schedules and watches."""

__version__ = "0.1.0"
