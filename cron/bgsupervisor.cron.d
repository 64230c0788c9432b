# bgsupervisor: /srv/myapp/current/bgsupervisor.toml
#
# A file for /etc/cron.d. `bgsupervisor cron --cron-d --install` writes it with your own paths; without --install it is
# printed. It must belong to root with rights 0644, and its name may hold no dot: cron passes over others in silence.
#
# Each minute `run` becomes the supervisor, or leaves at once because one is there. It needs no `flock` around it,
# which tasks would inherit and keep, and no redirection: what it has to say stands in logs/supervisor.log of the state
# directory. What it prints nevertheless is why nobody can supervise, and worth the mail that cron makes of it.

SHELL=/bin/sh
# Tasks inherit this one. cron reads no profile and expands nothing here; secrets belong into `env_file`.
PATH=/usr/local/bin:/usr/bin:/bin
# Who hears that nobody can supervise; empty for nobody.
MAILTO=root

# The sixth word is the user that supervises. A % needs a backslash before it, because cron makes a line end of it.
* * * * * deploy /srv/myapp/venv/bin/bgsupervisor run --config /srv/myapp/current/bgsupervisor.toml
