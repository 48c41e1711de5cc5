package runbook

import (
	"fmt"
	"strings"
	"time"

	"github.com/renewd/renewd/internal/clock"
)

// formatTime is [clock.Text], for a time that may not be known.
func formatTime(t time.Time) string {
	if t.IsZero() {
		return notKnown
	}
	return clock.Text(t)
}

// timeAndDistance formats t and how far it is from now.
func timeAndDistance(t, now time.Time) string {
	d := t.Sub(now)
	if d < time.Second && d > -time.Second {
		return formatTime(t) + " (now)"
	}
	if d < 0 {
		return formatTime(t) + " (" + formatDuration(-d) + " ago)"
	}
	return formatTime(t) + " (in " + formatDuration(d) + ")"
}

// formatDuration formats d with its two largest units: 6d23h, 23h4m, 1m20s, 12s. It
// rounds up, so that a remaining time is never too short.
func formatDuration(d time.Duration) string {
	unit := time.Second
	if d > time.Hour {
		unit = time.Minute
	}
	if d > 24*time.Hour {
		unit = time.Hour
	}
	d = max(d, 0)
	if rest := d % unit; rest > 0 {
		d += unit - rest
	}
	var b strings.Builder
	for _, u := range []struct {
		name string
		d    time.Duration
	}{{"d", 24 * time.Hour}, {"h", time.Hour}, {"m", time.Minute}, {"s", time.Second}} {
		if n := int64(d / u.d); n > 0 {
			fmt.Fprintf(&b, "%d%s", n, u.name)
			d %= u.d
		}
	}
	if b.Len() == 0 {
		return "0s"
	}
	return b.String()
}

// roughly is formatDuration without seconds, if d is a minute or more.
func roughly(d time.Duration) string {
	if d >= time.Minute {
		d = d.Truncate(time.Minute)
	}
	return formatDuration(d.Truncate(time.Second))
}

func quantity(n int, noun string) string {
	return fmt.Sprintf("%d %s", n, plural(n, noun))
}

func plural(n int, noun string) string {
	if n == 1 {
		return noun
	}
	return noun + "s"
}

func hasOrHave(n int) string {
	if n == 1 {
		return "has"
	}
	return "have"
}

// joinWithAnd returns names as "a, b and c".
func joinWithAnd(names []string) string {
	if len(names) < 2 {
		return strings.Join(names, "")
	}
	last := len(names) - 1
	return strings.Join(names[:last], ", ") + " and " + names[last]
}
