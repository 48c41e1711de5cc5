package selector

import (
	"fmt"
	"iter"
	"slices"
	"strconv"
	"strings"
)

// Entry is what [Warnings] needs of a registration entry.
type Entry struct {
	Name  string // its ID, or its SPIFFE ID
	Alias bool   // its selectors are those of nodes
	// Selectors are of the form TYPE:VALUE.
	Selectors []string
}

// The most warnings, and the most entries that one of them names.
const (
	maxWarnings = 20
	maxEntries  = 5
)

// Warnings returns a sentence for each selector that never matches, which names the entries
// that have it. They are ordered by selector. Those beyond 20 are counted.
func Warnings(entries iter.Seq[Entry]) []string {
	type unmet struct{ selector, problem string }
	entriesOf := make(map[unmet][]string)
	for e := range entries {
		for _, s := range e.Selectors {
			kind, value, _ := strings.Cut(s, ":")
			if problem := Check(e.Alias, kind, value); problem != "" {
				u := unmet{shown(kind, value), problem}
				entriesOf[u] = append(entriesOf[u], e.Name)
			}
		}
	}
	all := make([]string, 0, len(entriesOf))
	for u, ids := range entriesOf {
		all = append(all, fmt.Sprintf("selector %q of %s never matches: %s", u.selector, List(ids), u.problem))
	}
	slices.Sort(all)
	if more := len(all) - maxWarnings; more > 0 {
		all = append(all[:maxWarnings], fmt.Sprintf("and %d more selectors never match", more))
	}
	return all
}

// shown returns a selector for a warning, without its value if its name is unknown: what was
// to be docker:env may have a secret.
func shown(kindName, value string) string {
	if k := kindOf(kindName); k != nil {
		if n, _ := k.find(value); n != nil {
			return kindName + ":" + value
		}
	}
	first, _, more := strings.Cut(value, ":")
	if more {
		first += ":…"
	}
	return kindName + ":" + first
}

// List names the first five of a list of entries, in their order, each once.
func List(names []string) string {
	var quoted []string
	names = slices.Compact(slices.Sorted(slices.Values(names)))
	for i, name := range names {
		if i == maxEntries {
			return fmt.Sprintf("%s and %d more", strings.Join(quoted, ", "), len(names)-maxEntries)
		}
		quoted = append(quoted, strconv.Quote(name))
	}
	return strings.Join(quoted, ", ")
}
