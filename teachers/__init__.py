"""Heavy captioners, each behind the small interface of `teachers.teacher`."""
