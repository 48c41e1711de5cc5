package spireapi

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// EntryID returns the ID of an entry that was written without one: "entry-" and the first 16
// hex digits of the SHA-256 of its lines, each with a newline at its end. The lines are the
// parent's ID, which is empty for every agent, the SPIFFE ID, and the selectors as TYPE:VALUE,
// ordered by their bytes and each of them once. Its characters are those that a SPIRE server
// accepts in such an ID (1.13.3, sqlstore).
func EntryID(parentID, spiffeID string, selectors []string) string {
	selectors = slices.Clone(selectors)
	slices.Sort(selectors)
	lines := append([]string{parentID, spiffeID}, slices.Compact(selectors)...)
	sum := sha256.Sum256([]byte(strings.Join(lines, "\n") + "\n"))
	return "entry-" + hex.EncodeToString(sum[:8])
}

// texts returns selectors as TYPE:VALUE.
func texts(selectors []Selector) []string {
	out := make([]string, len(selectors))
	for i, sel := range selectors {
		out[i] = sel.Type + ":" + sel.Value
	}
	return out
}

// newID returns an ID for a new entry: that of [EntryID], or the first of those with -2, -3
// and so on behind it that is not taken. It is taken by an entry that was created like this
// one and has been edited since, and keeps its ID.
func newID(e Entry, taken func(id string) bool) string {
	parent := ""
	if !e.ParentID.IsZero() {
		parent = e.ParentID.String()
	}
	first := EntryID(parent, e.SPIFFEID.String(), texts(e.Selectors))
	id := first
	for n := 2; taken(id); n++ {
		id = fmt.Sprintf("%s-%d", first, n)
	}
	return id
}

// likeness has what two forms of one entry have in common: the fields that make it this
// entry, or all of them but one.
type likeness struct {
	parentID, spiffeID spiffeid.ID
	selectors          string
}

// likenesses are how an entry without an ID is found among the stored ones, in this order: it
// is as it was, or its selectors, its parent or its SPIFFE ID were edited.
var likenesses = []func(*Entry) likeness{
	func(e *Entry) likeness { return likeness{e.ParentID, e.SPIFFEID, joined(e)} },
	func(e *Entry) likeness { return likeness{parentID: e.ParentID, spiffeID: e.SPIFFEID} },
	func(e *Entry) likeness { return likeness{spiffeID: e.SPIFFEID, selectors: joined(e)} },
	func(e *Entry) likeness { return likeness{parentID: e.ParentID, selectors: joined(e)} },
}

func joined(e *Entry) string { return strings.Join(texts(e.Selectors), "\n") }

// maxCompared bounds with how many stored entries a new one is compared: all entries may have
// one parent and one SPIFFE ID.
const maxCompared = 100

// identify sets the IDs of those entries of a whole list that have none, so that an edit keeps
// its entry: agents then keep the SVID until they have its successor, and nobody is served
// what the entry was before. An entry gets the ID of a stored one that no other entry of the
// list has, if they are alike (see likenesses), or a new one. Of several that are alike the
// one with most selectors in common is taken, then the one with the lowest ID. The entries
// are canonical.
func (set *EntrySet) identify(entries []Entry) {
	taken := make(map[string]bool, len(entries))
	var unnamed []*Entry
	for i := range entries {
		if e := &entries[i]; e.ID != "" {
			taken[e.ID] = true
		} else {
			unnamed = append(unnamed, e)
		}
	}
	for _, alike := range likenesses {
		if len(unnamed) == 0 {
			return
		}
		stored := make(map[likeness][]*StoredEntry) // in descending order of IDs
		for _, e := range slices.Backward(set.sorted) {
			if !taken[e.ID] {
				stored[alike(&e.Entry)] = append(stored[alike(&e.Entry)], e)
			}
		}
		unnamed = slices.DeleteFunc(unnamed, func(e *Entry) bool {
			list := stored[alike(e)]
			best, most := -1, -1
			for i := len(list) - 1; i >= max(0, len(list)-maxCompared); i-- {
				if n := common(list[i].Selectors, e.Selectors); n > most {
					best, most = i, n
				}
			}
			if best < 0 {
				return false
			}
			e.ID = list[best].ID
			taken[e.ID] = true
			stored[alike(e)] = slices.Delete(list, best, best+1)
			return true
		})
	}
	for _, e := range unnamed {
		e.ID = newID(*e, func(id string) bool { return taken[id] || set.Entry(id) != nil })
		taken[e.ID] = true
	}
}

// common returns how many selectors are in both lists, each of which has them once.
func common(a, b []Selector) (n int) {
	for _, sel := range a {
		if slices.Contains(b, sel) {
			n++
		}
	}
	return n
}
