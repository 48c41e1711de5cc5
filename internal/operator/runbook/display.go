package runbook

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/renewd/renewd/internal/cli"
)

// steps is the number of steps of a rotation.
const steps = 5

// stepNumbers are the places of the steps. The wait has one of its own.
var stepNumbers = map[Action]int{ActPrepare: 1, ActActivate: 2, ActTaint: 3, actWait: 4, ActRemove: 5}

// actWait is the wait between taint and remove, for stepNumbers.
const actWait Action = "wait"

// display is what a wait shows until the next poll.
type display struct {
	step  Action
	title string
	line  string // where nothing is redrawn

	// The figure of the bar; a negative left is not known.
	left, total int
	what        string   // what is left
	notes       []string // more lines below the bar
	holders     []Holder
	byEnd       bool // the holders have an expected end
	most        map[string]int
	status      Status
	all         string // the command that lists all agents
	curve       *curve
	begun       time.Time // of the wait
}

// glyphs are the characters of a block.
type glyphs struct {
	ellipsis, full, empty, plan, axis string

	eighths []string // of a column of the plot, from an empty one to a full one
}

var (
	unicodeGlyphs = glyphs{cli.Ellipsis, "█", "░", "·", "│", []string{" ", "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"}}
	plainGlyphs   = glyphs{cli.PlainEllipsis, "#", "-", ".", "|", []string{" ", "#"}}
)

const (
	plotRowsMin, plotRowsMax = 3, 8
	plotTerminal             = 24 // rows of the least terminal with a plot
	barMin, barMax           = 8, 20
	namedOfGroup             = 3 // agents of a group that are named if there is room
)

// block returns the lines for a terminal of this size: what the wait is for, the figures,
// the plot and the agents, grouped by reason. The groups go before the plot.
func (d *display) block(columns, rows int, plain bool, now time.Time) []string {
	g := unicodeGlyphs
	if plain {
		g = plainGlyphs
	}
	room := rows - 1 // the line before the block stays visible
	lines := append([]string{d.head(columns, g, now)}, d.figures(columns, g, now)...)
	for _, note := range d.notes {
		lines = append(lines, cli.Shorten(note, columns, g.ellipsis))
	}
	groups := d.groups(now)
	var body []string
	for _, detail := range []groupDetail{{namedOfGroup, true}, {2, true}, {1, true}, {1, false}} {
		body = d.list(groups, detail, columns, room-len(lines), g, now)
		reserve := 0
		if detail.named > 1 && rows >= plotTerminal {
			reserve = plotRowsMax + 1
		}
		if len(lines)+len(body)+reserve <= room {
			break
		}
	}
	if height := min(room-len(lines)-len(body)-1, plotRowsMax); rows >= plotTerminal && height >= plotRowsMin {
		lines = append(lines, d.curve.plot(columns, height, g, now)...)
	}
	lines = append(lines, body...)
	for i, line := range lines {
		lines[i] = cli.Shorten(cli.Printable(line), columns, g.ellipsis)
	}
	return lines[:min(len(lines), max(room, 1))]
}

// failed returns the display with the error of a poll.
func (d *display) failed(keyset string, err error) *display {
	out := *d
	text := "no answer, retrying: " + err.Error()
	out.line = keyset + ": " + text
	out.notes = append([]string{"N" + text[1:]}, d.notes...)
	return &out
}

// head says which step this is and since when.
func (d *display) head(columns int, g glyphs, now time.Time) string {
	text := fmt.Sprintf("Step %d of %d: %s", stepNumbers[d.step], steps, d.title)
	since := formatDuration(now.Sub(d.begun).Truncate(time.Second))
	room := columns - cli.Width(since) - 2
	if room < 20 {
		return cli.Shorten(text, columns, g.ellipsis)
	}
	text = cli.Shorten(text, room, g.ellipsis)
	return text + strings.Repeat(" ", columns-cli.Width(text)-cli.Width(since)) + since
}

// figures says how much is left, with a bar, and the expected end.
func (d *display) figures(columns int, g glyphs, now time.Time) []string {
	if d.what == "" {
		return nil
	}
	text := d.what + ": not known"
	if d.left >= 0 {
		text = fmt.Sprintf("%s of %s %s", thousands(int64(d.left)), thousands(int64(max(d.total, d.left))), d.what)
	}
	end := ""
	if d.byEnd {
		end = ending(d.holders, now)
	}
	if width := min(barMax, columns-cli.Width(text)-cli.Width(end)-4); width >= barMin && d.left >= 0 && d.total > 0 {
		full := max(0, d.total-d.left) * width / d.total
		text += "  " + strings.Repeat(g.full, full) + strings.Repeat(g.empty, width-full)
	}
	if end != "" {
		text += "  " + end
	}
	return []string{text}
}

const noKnownEnd = "no known end"

// ending is the expected end for a line. It is empty without holders.
func ending(holders []Holder, now time.Time) string {
	switch end, reason := estimate(holders, now); {
	case len(holders) == 0:
		return ""
	case end.IsZero():
		return noKnownEnd
	case Holder{Reason: reason}.holdingsUnknown() || reason == reasonSettling:
		return "done in " + formatDuration(end.Sub(now)) + " at the latest"
	default:
		return "done in about " + formatDuration(end.Sub(now))
	}
}

// group has the agents that are counted for one reason, the worst first.
type group struct {
	reason  string
	holders []Holder
}

// reasonOrder has the reasons, those that need an operator most first.
var reasonOrder = []string{
	reasonUnidentified, reasonDuplicated, reasonRestored, reasonSilent, reasonBehind, reasonStreams, reasonSettling, reasonWaiting, reasonRenewing, reasonSigning,
}

func (d *display) groups(now time.Time) []group {
	by := make(map[string][]Holder)
	for _, h := range byEnd(d.holders, now) {
		by[h.Reason] = append(by[h.Reason], h)
	}
	var out []group
	for reason, holders := range by {
		out = append(out, group{reason, holders})
	}
	place := func(g group) int {
		if i := slices.Index(reasonOrder, g.reason); i >= 0 {
			return i
		}
		return len(reasonOrder) // a newer server's
	}
	slices.SortFunc(out, func(a, b group) int { return cmp.Or(place(a)-place(b), cmp.Compare(a.reason, b.reason)) })
	return out
}

// groupDetail is how much of a group is shown.
type groupDetail struct {
	named    int  // agents
	commands bool // what to do next
}

// reasonColumn is the width of a reason.
const reasonColumn = len(reasonUnidentified)

// list shows the groups in at most room lines. The last line counts agents that are not
// named and says how to list all.
func (d *display) list(groups []group, detail groupDetail, columns, room int, g glyphs, now time.Time) []string {
	const indent = 4 + 1 + reasonColumn + 1
	var lines []string
	named := 0
	for i, gr := range groups {
		count := 0
		for j, h := range gr.holders[:min(len(gr.holders), detail.named)] {
			begin := strings.Repeat(" ", indent)
			if j == 0 {
				begin = fmt.Sprintf("%4d %-*s ", len(gr.holders), reasonColumn, gr.reason)
			}
			lines = append(lines, begin+d.agent(h, columns-indent, g, now))
			count++
		}
		if next := d.next(gr, columns-indent, now); next != "" && detail.commands {
			lines = append(lines, strings.Repeat(" ", indent)+next)
		}
		// The line that counts the others needs a place, too.
		if len(lines) > room-1 && !detail.commands && i < len(groups)-1 {
			lines = lines[:max(0, room-1)]
			named = min(named+count, len(lines))
			break
		}
		named += count
	}
	if more := len(d.holders) - named; more > 0 {
		lines = append(lines, cli.Shorten(fmt.Sprintf("and %d more; %s lists all", more, d.all), columns, g.ellipsis))
	}
	return lines
}

// agent describes an agent of a group. The name keeps leastName columns, and more if the
// facts leave room.
func (d *display) agent(h Holder, width int, g glyphs, now time.Time) string {
	const leastName = 16
	detail := h.fact(d.most[h.Agent], moment{now, d.status.ServerStartedAt})
	name := h.who()
	if name == "" {
		return detail
	}
	room := max(width-cli.Width(detail)-2, leastName)
	return shortenName(name, room, g.ellipsis) + "  " + detail
}

// shortenName shortens the ID after the hostname or label first: IDs differ at the end,
// hostnames at the beginning.
func shortenName(name string, width int, ellipsis string) string {
	const leastID = 12
	host, id, both := strings.Cut(name, " ")
	room := width - cli.Width(host) - 1
	switch {
	case !both:
		return cli.ShortenMiddle(name, width, ellipsis)
	case room < min(leastID, cli.Width(id)):
		return cli.Shorten(host, width, ellipsis)
	}
	return host + " " + cli.ShortenMiddle(id, room, ellipsis)
}

// next returns the operator's next step for a group. It is empty if there is none but to
// wait. A command has the ID of the worst agent if there is room for all of it, because a
// part cannot be pasted.
func (d *display) next(gr group, width int, now time.Time) string {
	worst := gr.holders[0]
	command := func(before, text, after string) string {
		if full := before + strings.ReplaceAll(text, "ID", worst.Agent) + after; worst.Agent != "" && cli.Width(full) <= width {
			return full
		}
		return before + text + after
	}
	switch gr.reason {
	case reasonSilent:
		if worst.noReportYet(d.status.ServerStartedAt) && !d.status.ServerStartedAt.IsZero() && now.Sub(d.status.ServerStartedAt) < firstReports {
			return "agents report within a minute of the server's start"
		}
		return command("the node is gone for good? ", d.status.EvictGone, "")
	case reasonBehind:
		return "on that node: agent status, and the agent's log"
	case reasonStreams:
		return "on that node: ss -xp names workloads that do not read"
	case reasonDuplicated:
		return command("", d.status.Evict, "; a new token for each node")
	case reasonUnidentified:
		return "wait until it is attested, or upgrade it"
	case reasonRestored:
		return "nothing but time, or remove --force, ends this"
	}
	return ""
}

// firstReports is how long after the server's start an agent may not have reported.
const firstReports = 90 * time.Second
