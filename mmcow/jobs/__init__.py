# SPDX-License-Identifier: MIT
"""The long operations on disks, each a function over images or paths.

They stream: memory is bounded whatever the size. ``progress`` (``mmcow.jobs.progress``) reports
and stops them; every stop, also a power cut, leaves valid images, and the same call again goes on.
"""
