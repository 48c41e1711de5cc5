package spireapi

import (
	"cmp"
	"hash/maphash"
	"maps"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// edit is one entry in its new form; it is removed if entry is nil.
type edit struct {
	id    string
	entry *StoredEntry
}

// splice returns a copy of a list in which edits have been made. Both are ordered by ID, and
// edits has each ID once. What is between two edits is copied without being compared.
func splice(list []*StoredEntry, edits []edit) []*StoredEntry {
	out := make([]*StoredEntry, 0, len(list)+len(edits))
	for _, e := range edits {
		at, found := search(list, e.id)
		out = append(out, list[:at]...)
		if found {
			at++
		}
		list = list[at:]
		if e.entry != nil {
			out = append(out, e.entry)
		}
	}
	return append(out, list...)
}

// search returns the place of an ID in a list that is ordered by ID, and whether it is there.
func search(list []*StoredEntry, id string) (at int, found bool) {
	return slices.BinarySearchFunc(list, id, func(e *StoredEntry, id string) int { return cmp.Compare(e.ID, id) })
}

// index has lists of entries, each ordered by ID, by one of the entries' SPIFFE IDs. It is
// immutable. It consists of many small maps, so that a change copies only those which
// differ.
type index [256]map[spiffeid.ID][]*StoredEntry

var indexSeed = maphash.MakeSeed()

func part(id spiffeid.ID) int { return int(maphash.Comparable(indexSeed, id) % uint64(len(index{}))) }

func (ix *index) get(id spiffeid.ID) []*StoredEntry { return ix[part(id)][id] }

// with returns an index in which edits, ordered by ID, have been made. key is the ID by which
// entries are indexed; before has the entries of ix.
func (ix *index) with(edits []edit, before *EntrySet, key func(*StoredEntry) spiffeid.ID) *index {
	lists := make(map[spiffeid.ID][]edit)
	for _, e := range edits {
		if old := before.Entry(e.id); old != nil && (e.entry == nil || key(old) != key(e.entry)) {
			lists[key(old)] = append(lists[key(old)], edit{id: e.id})
		}
		if e.entry != nil {
			lists[key(e.entry)] = append(lists[key(e.entry)], e)
		}
	}
	out := *ix
	var copied [len(index{})]bool
	for id, edits := range lists {
		p := part(id)
		if !copied[p] {
			if out[p] = maps.Clone(out[p]); out[p] == nil {
				out[p] = make(map[spiffeid.ID][]*StoredEntry)
			}
			copied[p] = true
		}
		if list := splice(out[p][id], edits); len(list) > 0 {
			out[p][id] = list
		} else {
			delete(out[p], id)
		}
	}
	return &out
}
