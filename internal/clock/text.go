package clock

import "time"

// Text formats t for people, in UTC, as all programs do: the layout of
// [time.Time.String], which the runbook's list has. JSON and logs have RFC 3339.
func Text(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 -0700 MST") }
