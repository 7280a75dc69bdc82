"""What goes wrong outside of the code: damaged files, full disks, dead peers, secrets, hostile input; each put in by hand.

A short part with fixed seeds runs with `make test`, all of it with `make test-all`. Tests report what they tried with the
fixture `figure`; a table of it stands at the end of the run.
"""
