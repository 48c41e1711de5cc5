package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	"github.com/renewd/renewd/internal/api"
)

// TestNothingIsRemovedUnseen applies random files to a server, through its commands: edited
// ones, with IDs and without, cut off anywhere, with documents and entries twice, with
// anchors and aliases.
//
//   - A file removes the entries that its dry run printed as removed, and no others.
//   - A dry run, and a file that is refused, change nothing.
//   - No file removes many entries without their number, which the dry run prints.
//   - The list that the server prints for apply changes nothing.
//
// RENEWD_SEED replays one history; RENEWD_HISTORIES sets their number.
func TestNothingIsRemovedUnseen(t *testing.T) {
	t.Parallel()
	l := newLive(t)
	histories := 2
	if n, err := strconv.Atoi(os.Getenv("RENEWD_HISTORIES")); err == nil {
		histories = n
	}
	base := rand.Uint64()
	if seed, err := strconv.ParseUint(os.Getenv("RENEWD_SEED"), 10, 64); err == nil {
		base, histories = seed, 1
	}
	met := map[string]int{}
	for i := range histories {
		h := &history{t: t, live: l, rand: rand.New(rand.NewPCG(base+uint64(i), 0)), met: met}
		h.play()
		if t.Failed() {
			t.Fatalf("RENEWD_SEED=%d; the last file:\n%s", base+uint64(i), h.file)
		}
	}
	t.Log(met)
	for _, what := range []string{"accepted", "refused", "invalid", "removed", "edited", "cut"} {
		if met[what] == 0 && histories > 1 {
			t.Errorf("no file was %s", what)
		}
	}
}

// A history is one sequence of files.
type history struct {
	t    *testing.T
	live *live
	rand *rand.Rand
	met  map[string]int

	want []written         // what the operator has in mind
	file string            // what was written last
	is   map[string]string // the stored entries, as they were last seen
}

// written is an entry as an operator writes it.
type written struct {
	id, path, hint string
	selectors      []string
}

func (h *history) play() {
	h.is = h.stored()
	for range 15 {
		h.edit()
		h.file = h.text()
		h.damage()
		h.apply()
		if h.t.Failed() {
			return
		}
	}
	// A file that is cut at every byte. Most of what is left is no file of entries, and no
	// server is asked then.
	whole := h.text()
	for cut := range min(len(whole), 400) {
		h.file = whole[:cut]
		if _, err := parseEntries("", []byte(h.file)); err != nil {
			h.met["cut"]++
			continue
		}
		h.apply()
		if h.t.Failed() {
			return
		}
	}
}

func (h *history) selectors() (out []string) {
	for i := range 1 + h.rand.IntN(3) {
		out = append(out, []string{"unix:uid:", "unix:gid:", "unix:user:u"}[i]+fmt.Sprint(h.rand.IntN(4)))
	}
	return out
}

// edit changes what the operator has in mind.
func (h *history) edit() {
	for range 1 + h.rand.IntN(3) {
		at := h.rand.IntN(len(h.want) + 1)
		switch what := h.rand.IntN(8); {
		case at == len(h.want) || what == 0:
			for range 1 + h.rand.IntN(12) {
				e := written{path: fmt.Sprintf("/p%d", h.rand.IntN(30)), selectors: h.selectors()}
				if h.rand.IntN(2) == 0 {
					e.id = fmt.Sprintf("e%d", h.rand.IntN(1000))
				}
				h.want = append(h.want, e)
			}
		case what == 1:
			h.want = slices.Delete(h.want, at, min(len(h.want), at+1+h.rand.IntN(8)))
		case what == 2:
			h.want[at].selectors = h.selectors()
		case what == 3:
			h.want[at].path = fmt.Sprintf("/p%d", h.rand.IntN(30))
		case what == 4:
			h.want[at].hint = fmt.Sprint("h", h.rand.IntN(9))
		case what == 5:
			h.want[at].id = ""
		case what == 6:
			other := h.rand.IntN(len(h.want))
			h.want[at].selectors, h.want[other].selectors = h.want[other].selectors, h.want[at].selectors
		default:
			h.rand.Shuffle(len(h.want), func(i, j int) { h.want[i], h.want[j] = h.want[j], h.want[i] })
		}
	}
}

// text writes the entries, in one of the ways that YAML has.
func (h *history) text() string {
	var out strings.Builder
	out.WriteString("entries:")
	if len(h.want) == 0 {
		return "entries: []\n"
	}
	for i, e := range h.want {
		first := "\n- "
		field := func(name, value string) {
			out.WriteString(first + name + ": " + value)
			first = "\n  "
		}
		if e.id != "" {
			field("id", e.id)
		}
		field("spiffe_id", "spiffe://example.org"+e.path)
		if e.hint != "" {
			field("hint", fmt.Sprintf("&h%d %s", i, e.hint))
		}
		if h.rand.IntN(2) == 0 {
			field("selectors", "["+strings.Join(e.selectors, ", ")+"]")
		} else {
			field("selectors", "\n  - "+strings.Join(e.selectors, "\n  - "))
		}
	}
	return out.String() + "\n"
}

// damage makes one of the usual mistakes, or none.
func (h *history) damage() {
	switch h.rand.IntN(12) {
	case 0:
		h.file = h.file[:h.rand.IntN(len(h.file))]
	case 1:
		h.file += "---\n" + h.file
	case 2:
		h.file += "---\n"
	case 3:
		h.file = "---\n" + h.file + "...\n"
	case 4:
		h.file = strings.Replace(h.file, "\n- ", "\n- &first ", 1) + "- *first\n"
	case 5:
		h.file = strings.ReplaceAll(h.file, "\n  ", "\n\t")
	case 6:
		h.file += h.file
	case 7:
		h.file = h.file[h.rand.IntN(len(h.file)):]
	}
}

// changes is what apply prints with -o json.
type changes struct {
	Changes []struct {
		Change        string
		Before, After *struct{ ID string }
	}
	Unchanged int
	Warnings  []string
}

// ids returns the sorted IDs of the entries of one kind of change, or with another ID after
// it than before.
func (c changes) ids(kind string) (out []string) {
	for _, one := range c.Changes {
		switch {
		case one.Change != kind:
		case one.After == nil:
			out = append(out, one.Before.ID)
		default:
			out = append(out, one.After.ID)
		}
	}
	slices.Sort(out)
	return out
}

// stored returns the entries of the server by ID.
func (h *history) stored() map[string]string {
	out, code := h.live.entries("", "list", "-o", "json")
	var list struct {
		Entries []map[string]any
	}
	if err := json.Unmarshal([]byte(out), &list); code != 0 || err != nil {
		h.t.Fatalf("list: status %d, %v", code, err)
	}
	entries := map[string]string{}
	for _, e := range list.Entries {
		entries[e["id"].(string)] = fmt.Sprint(e)
	}
	return entries
}

// try runs apply and returns what it prints.
func (h *history) try(file string, args ...string) (c changes, code int) {
	out, code := h.live.entries(file, append([]string{"apply", "-", "-o", "json"}, args...)...)
	if code == 0 {
		if err := json.Unmarshal([]byte(out), &c); err != nil {
			h.t.Errorf("apply: %v: %s", err, out)
		}
	}
	return c, code
}

// apply applies the file as an operator does: a dry run, then in earnest, and with the number
// of removed entries if it is asked for.
func (h *history) apply() {
	before := h.is
	dry, code := h.try(h.file, "--dry-run")
	if code != 0 {
		h.met["invalid"]++
		if _, code := h.try(h.file); code == 0 {
			h.t.Error("the dry run is refused, and the file is not")
		}
	}
	if now := h.stored(); !maps.Equal(now, before) {
		h.t.Errorf("the dry run changed %v to %v", before, now)
	}
	if code != 0 {
		return
	}
	removed := dry.ids(removed)
	done, code := h.try(h.file)
	if n := len(removed); code != 0 && n > 0 {
		h.met["refused"]++
		if now := h.stored(); !maps.Equal(now, before) {
			h.t.Errorf("the refused file changed %v to %v", before, now)
		}
		if _, code := h.try(h.file, "--remove", strconv.Itoa(n+1)); code == 0 {
			h.t.Errorf("%d entries are removed with --remove %d", n, n+1)
		}
		done, code = h.try(h.file, "--remove", strconv.Itoa(n))
		h.met["--remove"]++
	} else if n == len(before) && n > 0 || n > 20 || n > 5 && n*10 > len(before) {
		h.t.Errorf("%d of %d entries are removed without their number", n, len(before))
	}
	if code != 0 {
		h.t.Errorf("apply ends with status %d after a dry run without problems", code)
		return
	}
	h.met["accepted"]++
	after := h.stored()
	h.is = after
	var gone, edited []string
	for id, e := range before {
		switch now, kept := after[id]; {
		case !kept:
			gone = append(gone, id)
		case now != e:
			edited = append(edited, id)
		}
	}
	slices.Sort(gone)
	slices.Sort(edited)
	h.met["removed"] += len(gone)
	h.met["edited"] += len(edited)
	for _, c := range []changes{dry, done} {
		if !slices.Equal(c.ids("removed"), gone) || !slices.Equal(c.ids(changed), edited) || len(after) != len(before)-len(gone)+len(c.ids(added)) {
			h.t.Errorf("printed %+v, and removed %q, edited %q: before %v, after %v", c, gone, edited, before, after)
		}
	}
	if h.rand.IntN(4) > 0 {
		return
	}
	if same, code := h.try(h.file); code != 0 || len(same.Changes) > 0 {
		h.t.Errorf("the same file again changes %+v (%d)", same, code)
	}
	list, code := h.live.entries("", "list", "-o", "yaml")
	if same, code2 := h.try(list); code != 0 || code2 != 0 || len(same.Changes) > 0 || same.Unchanged != len(after) {
		h.t.Errorf("the list of the server changes it: %+v (%d, %d)\n%s", same, code, code2, list)
	}
}

// TestListIsAFile: whatever an entry has, the list as YAML is a file with the same entries.
func TestListIsAFile(t *testing.T) {
	t.Parallel()
	text := rapid.OneOf(rapid.StringN(1, 20, 60), rapid.SampledFrom([]string{"null", "true", "0x1f", "1e3", "2027-01-31", "~", "- a", "a: b", "#", "&a", "*a", "!!str x", "<<", "=", "\t", "a\nb", "'", `"`, "|", "é", " "}))
	rapid.Check(t, func(t *rapid.T) {
		var want []*api.Entry
		for i := range rapid.IntRange(0, 4).Draw(t, "entries") {
			e := &api.Entry{
				Id: fmt.Sprint(text.Draw(t, "id"), i), SpiffeId: fmt.Sprintf("spiffe://example.org/%d", i), Hint: text.Draw(t, "hint"),
				Operator: rapid.Bool().Draw(t, "operator"), DisableX509SvidPrefetch: rapid.Bool().Draw(t, "prefetch"), JwtSvidIncludeJti: rapid.Bool().Draw(t, "jti"),
				FederatesWith: rapid.SliceOf(rapid.StringMatching(`[a-z0-9_-]{1,5}(\.[a-z0-9]{1,3})?`)).Draw(t, "federates_with"),
			}
			for range rapid.IntRange(1, 3).Draw(t, "selectors") {
				e.Selectors = append(e.Selectors, &api.Selector{Type: strings.ReplaceAll(text.Draw(t, "type"), ":", ";"), Value: text.Draw(t, "value")})
			}
			if rapid.Bool().Draw(t, "parent") {
				e.ParentId = "spiffe://example.org/spire/agent/a"
			}
			if rapid.Bool().Draw(t, "more") {
				e.DnsNames = []string{"a.example.org", "*.b"}
				e.X509Ttl, e.JwtTtl = durationpb.New(2*3600e9), durationpb.New(90e9)
				e.ExpiresAt = &timestamppb.Timestamp{Seconds: rapid.Int64Range(1, 4e9).Draw(t, "expires_at")}
			}
			want = append(want, e)
		}
		shown := make([]*shownEntry, 0, len(want))
		for _, e := range want {
			shown = append(shown, showEntry(e))
		}
		var file strings.Builder
		if err := printFile(&file, shown); err != nil {
			t.Fatal(err)
		}
		got, err := parseEntries("list.yaml", []byte(file.String()))
		if err != nil || !slices.EqualFunc(got, want, func(a, b *api.Entry) bool { return proto.Equal(a, b) }) {
			t.Fatalf("%v\ngot  %v\nwant %v\n%s", err, got, want, file.String())
		}
	})
}
