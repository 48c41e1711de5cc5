package main

import (
	"bytes"
	"fmt"
	"io"

	"github.com/renewd/renewd/internal/cli"
)

// print writes the report as text.
func (r *Report) print(w io.Writer, s *screen) error {
	var b bytes.Buffer
	row := func(name, format string, args ...any) {
		fmt.Fprintln(&b, s.wrap(28, fmt.Sprintf("  %-24s  %s", name, fmt.Sprintf(format, args...))))
	}
	fmt.Fprintf(&b, "\n%s\n", s.paint(bold, "REPORT"))
	row("Identities", "%d SVIDs, %d of them in use by workloads", r.SVIDs, r.Workloads)
	row("Calls between workloads", "%d handshakes, %d failed", r.Handshakes, r.Failed)
	if r.FirstFailure != "" {
		row("First failure", "%s", r.FirstFailure)
	}
	row("Longest without an SVID", "%v s, over all workloads", r.LongestGap)
	row("Random delay", "%.1f s of at most %v s, after the agent saw the taint (%s)", r.Delay, r.MaxDelay, after(r.Seen, "it"))
	row("Renewals", "%d, including the agent SVID; most in any second: %d", r.Renewals, r.MostPerSecond)
	row("Workloads on the new key", "%s", after(r.InUse, "the taint"))
	row("Settled", "%s (nothing on this node depended on the old key)", after(r.Settled, "the taint"))
	if r.JWT.AfterRemoval != "" {
		same := "unchanged by the taint"
		if !r.JWT.SameDuringTaint {
			same = "changed during the taint"
		}
		row("JWT-SVIDs", "%s; %s after the removal (%s)", same, r.JWT.AfterRemoval, after(r.JWT.Replaced, "it"))
	}
	for _, k := range r.SafeToRemove {
		switch {
		case k.Type == "x509" && k.Safe:
			row("Safe to remove", "X.509 key: %s", after(k.After, "the taint"))
		case k.Type == "x509":
			row("Safe to remove", "X.509 key: no")
		case k.NotBefore != nil:
			row("", "JWT key: from %s, when its last JWT-SVID expires", k.NotBefore.Local().Format("Jan 2 15:04"))
		}
	}
	row("Whole demo", "%.0f s", r.Elapsed)

	fmt.Fprintf(&b, "\n%s\n", s.paint(bold, "PROMISES"))
	for _, p := range r.Promises {
		verdict := s.paint(green, "held  ")
		if !p.Held {
			verdict = s.paint(red, "BROKEN")
		}
		fmt.Fprintln(&b, s.wrap(26, fmt.Sprintf("  %s  %-14s  %s", verdict, p.Name, p.Promise)))
		if !p.Held {
			fmt.Fprintln(&b, s.wrap(26, fmt.Sprintf("%26s%s", "", cli.Printable(p.Measured))))
		}
	}
	end := s.paint(green, "Every promise held.")
	if !r.OK {
		end = s.paint(red, fmt.Sprintf("%d of %d promises broken.", len(r.Broken), len(r.Promises)))
	}
	fmt.Fprintf(&b, "\n%s\n", end)
	_, err := w.Write(b.Bytes())
	return err
}

// after describes the time since an event.
func after(s *Seconds, event string) string {
	if s == nil {
		return "never"
	}
	return fmt.Sprintf("%.1f s after %s", *s, event)
}
