"""Batch mode: requests are sent as jobs that the provider works through in hours, for a part of the price.

passes.py     the way in for fetcher.py: what jobs do not answer is left for online calls
door.py       which jobs are open, what they may cost, one round of asking by jobs
dispatch.py   cuts what is missing into jobs, keeps some open, sends unanswered lines again
life.py       one job from its intent to the last settled line, from wherever it was left
settle.py     the results of a job into the response store, each line once
tracker.py    what is known of jobs on disk, so that `kill -9` loses none
provider.py   what a provider must be able to do; openai.py and anthropic.py do it
calls.py      single calls of batch endpoints, with retries
"""
