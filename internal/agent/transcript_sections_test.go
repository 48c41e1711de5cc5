package agent_test

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Units of the times in a section.
const (
	exact  = 10 * time.Millisecond
	polled = 10 * time.Second // for what comes with a random poll
	paused = 2 * time.Minute  // for what comes after a random pause of up to a minute
	random = 0                // neither times nor counts
)

// section is a part of a transcript.
type section struct {
	title   string
	from    time.Time
	unit    time.Duration // times are rounded down to it
	unnamed bool          // only how mints end is written, not of which SVIDs
}

// line is one line of a transcript: an event, or equal ones.
type line struct {
	event
	since time.Duration // since the section began
	whos  []string      // in the order of their events, or sorted if those have one instant
	every time.Duration // between their events
}

// lines returns the lines of a section's events.
func (s section) lines(events []event) []line {
	var all []line
	last := make(map[string]int) // line of the last transition of an SVID
	for _, e := range events {
		if e.kind == kindSVID && s.unnamed {
			if e.states[0] != "minting" {
				continue
			}
			e.who = ""
		}
		l := line{event: e, whos: []string{e.who}}
		if s.unit != random {
			l.since = e.at.Sub(s.from).Truncate(s.unit)
		}
		if e.kind == kindSVID {
			if i, ok := last[e.who]; ok && s.unit != random && !s.unnamed && all[i].since == l.since {
				if l := &all[i]; e.states[0] == "minting" || !l.minted() {
					l.what = e.what
				}
				all[i].states = append(all[i].states, e.states[1:]...)
				continue
			}
			last[e.who] = len(all)
		}
		all = append(all, l)
	}
	for i := range all {
		if l := &all[i]; l.kind == kindSVID {
			l.how = strings.Join(l.states, " -> ")
			if l.minted() {
				l.what = "svid " + l.what // the outcome
			} else {
				l.what = "svid " + l.states[len(l.states)-1] + ": " + l.what
			}
		}
	}
	slices.SortStableFunc(all, func(a, b line) int {
		return cmp.Or(cmp.Compare(a.since, b.since), cmp.Compare(a.kind, b.kind), cmp.Compare(a.order, b.order),
			cmp.Compare(a.what, b.what), cmp.Compare(a.how, b.how), cmp.Compare(number(a.who), number(b.who)), cmp.Compare(a.who, b.who))
	})
	return foldSeries(foldInstant(all, s.unit == random))
}

// minted reports whether a mint ended in these transitions of an SVID.
func (l line) minted() bool { return slices.Contains(l.states[:len(l.states)-1], "minting") }

func (l line) folds(with line) bool {
	return l.kind == with.kind && l.what == with.what && l.how == with.how
}

// foldInstant folds equal events of one instant. once leaves one of those of one workload.
func foldInstant(lines []line, once bool) []line {
	var out []line
	for _, l := range lines {
		if n := len(out); n > 0 && out[n-1].since == l.since && out[n-1].folds(l) {
			if to := &out[n-1]; !once || !slices.Contains(to.whos, l.who) {
				to.whos = append(to.whos, l.who)
			}
			continue
		}
		out = append(out, l)
	}
	return out
}

// foldSeries folds three and more equal events with the same time between them.
func foldSeries(lines []line) []line {
	var out []line
	for i := 0; i < len(lines); {
		l, n := lines[i], 1
		if i+1 < len(lines) && len(l.whos) == 1 && l.kind == kindSVID {
			l.every = lines[i+1].since - l.since
			for ; i+n < len(lines); n++ {
				next := lines[i+n]
				if len(next.whos) != 1 || !l.folds(next) || next.since-lines[i+n-1].since != l.every {
					break
				}
			}
		}
		if n < 3 {
			l.every, n = 0, 1
		}
		for _, next := range lines[i+1 : i+n] {
			l.whos = append(l.whos, next.who)
		}
		out = append(out, l)
		i += n
	}
	return out
}

// number returns the number at the end of a workload's name, -1 if there is none.
func number(name string) int {
	n, err := strconv.Atoi(name[strings.LastIndexByte(name, '/')+1:])
	if err != nil {
		return -1
	}
	return n
}

// text returns the line with its time rounded to the unit.
func (l line) text(unit time.Duration) string {
	at := "-"
	switch {
	case unit >= time.Second:
		at = fmt.Sprintf("+%.0fs..%.0fs", l.since.Seconds(), (l.since + unit).Seconds())
	case unit > 0:
		at = fmt.Sprintf("+%.2fs", l.since.Seconds())
	}
	how := l.how
	if n := len(l.whos); n > 1 {
		how += fmt.Sprintf("  x%d", n)
		if l.every > 0 {
			how += fmt.Sprintf(", every %.2fs", l.every.Seconds())
		}
	}
	text := fmt.Sprintf("%-13s%-28s", at, l.what)
	if who := names(l.whos); who != "" {
		text += fmt.Sprintf("  %-20s", who)
	}
	return strings.TrimRight(text+"  "+how, " ") + "\n"
}

// names joins the names of workloads: /workload/0-4,7.
func names(whos []string) string {
	if len(whos) == 1 || whos[0] == "" {
		return whos[0]
	}
	var b strings.Builder
	for i := 0; i < len(whos); {
		n := 1
		for i+n < len(whos) && number(whos[i+n]) == number(whos[i])+n {
			n++
		}
		if i == 0 {
			b.WriteString(whos[0])
		} else {
			fmt.Fprintf(&b, ",%d", number(whos[i]))
		}
		if n > 2 {
			fmt.Fprintf(&b, "-%d", number(whos[i+n-1]))
		} else {
			n = 1
		}
		i += n
	}
	return b.String()
}
