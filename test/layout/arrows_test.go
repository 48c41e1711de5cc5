package layout

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/renewd/renewd/test/tree"
)

const module = tree.Module

var root = tree.FS("../..")

// room is a part of the house that the sentences about imports name.
type room string

// The rooms whose name is not their folder.
const (
	agentWing    room = "agent wing"
	serverWing   room = "server wing"
	operatorWing room = "operator wing"
	groundFloor  room = "ground floor"
	tests        room = "tests"
)

// ground are the folders of the ground floor.
var ground = []string{"api", "cli", "clock", "config", "listen", "loglimit", "refusal", "selector", "socket"}

// roomOf is the room of a folder, "" for a folder that has none.
func roomOf(folder string) room {
	first, rest, _ := strings.Cut(folder, "/")
	second, _, _ := strings.Cut(rest, "/")
	switch {
	case folder == "bundle", folder == "cache", folder == "metrics", folder == "renew", folder == "renew/wave", first == "cmd":
		return room(folder)
	case first == "test", first == "deploy":
		return tests
	case first != "internal":
		return ""
	case second == "agent":
		return agentWing
	case second == "server":
		return serverWing
	case second == "operator":
		return operatorWing
	case slices.Contains(ground, second):
		return groundFloor
	}
	return ""
}

// arrows says which other rooms a room imports at most.
var arrows = map[room][]room{
	"bundle":        {},
	"cache":         {"bundle"},
	"renew/wave":    {},
	"renew":         {"bundle", "cache", "renew/wave"},
	"metrics":       {},
	groundFloor:     {},
	agentWing:       {groundFloor, "bundle", "cache", "metrics", "renew", "renew/wave"},
	serverWing:      {groundFloor, "bundle", "metrics", "renew/wave"},
	operatorWing:    {groundFloor, "bundle", "metrics", "renew/wave"},
	"cmd/agent":     {agentWing, groundFloor, "bundle", "cache", "metrics", "renew", "renew/wave"},
	"cmd/server":    {serverWing, operatorWing, groundFloor, "bundle", "metrics", "renew/wave"},
	"cmd/keysetctl": {operatorWing, groundFloor, "bundle", "metrics", "renew/wave"},
	"cmd/demo":      {agentWing, serverWing, operatorWing, groundFloor, "bundle", "cache", "metrics", "renew", "renew/wave"},
	tests:           {agentWing, serverWing, operatorWing, groundFloor, "bundle", "cache", "metrics", "renew", "renew/wave"},
}

// withoutGRPC are the rooms that import no gRPC.
var withoutGRPC = []room{"bundle", "cache", "renew", "renew/wave"}

// folderOf is the folder of a package.
func folderOf(p tree.Package) string { return strings.TrimPrefix(p.ImportPath, module+"/") }

// check returns what is wrong with the imports of packages, and what goes from
// which room to which.
func check(all []tree.Package) (wrong []string, graph map[room]map[room]int) {
	graph = make(map[room]map[room]int)
	for _, p := range all {
		from := roomOf(folderOf(p))
		if from == "" || arrows[from] == nil {
			wrong = append(wrong, folderOf(p)+" is in no room")
			continue
		}
		if graph[from] == nil {
			graph[from] = make(map[room]int)
		}
		for _, i := range p.Imports {
			if slices.Contains(withoutGRPC, from) && strings.HasPrefix(i, "google.golang.org/grpc") {
				wrong = append(wrong, folderOf(p)+" imports "+i)
			}
			folder, ours := strings.CutPrefix(i, module+"/")
			to := roomOf(folder)
			if !ours || to == from {
				continue
			}
			graph[from][to]++
			if !slices.Contains(arrows[from], to) {
				wrong = append(wrong, fmt.Sprintf("%s imports %s: not from %s to %s", folderOf(p), folder, from, to))
			}
		}
	}
	return wrong, graph
}

// TestArrows: packages import what the rooms that they are in may import.
func TestArrows(t *testing.T) {
	t.Parallel()
	all := tree.Packages(t, "../..")
	wrong, graph := check(all)
	for _, w := range wrong {
		t.Error(w)
	}
	for _, from := range slices.Sorted(maps.Keys(graph)) {
		var to []string
		for _, r := range slices.Sorted(maps.Keys(graph[from])) {
			to = append(to, fmt.Sprintf("%s (%d)", r, graph[from][r]))
		}
		t.Logf("%-13s -> %s", from, strings.Join(to, ", "))
	}
}

// TestRooms: each folder with a package is in the table of ARCHITECTURE.md, and
// each folder of the table has a package.
func TestRooms(t *testing.T) {
	t.Parallel()
	_, table, _ := strings.Cut(tree.Read(t, root, "ARCHITECTURE.md"), "\n## The rooms\n")
	table, _, _ = strings.Cut(table, "\n## ")
	var want, got []string
	for _, p := range tree.Packages(t, "../..") {
		want = append(want, folderOf(p))
	}
	for line := range strings.Lines(table) {
		if cell, ok := strings.CutPrefix(line, "| `"); ok {
			cell, _, _ = strings.Cut(cell, "` |")
			got = append(got, strings.Split(cell, "`, `")...)
		}
	}
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(want, got) {
		t.Errorf("the table has\n%q\nand there are\n%q", got, want)
	}
}

// TestWrongArrows: an import that no sentence allows is found, in each room.
func TestWrongArrows(t *testing.T) {
	t.Parallel()
	for _, w := range planted {
		if wrong, _ := check([]tree.Package{{ImportPath: module + "/" + w.in, Imports: []string{w.imports}}}); len(wrong) != 1 && w.sentence {
			t.Errorf("%s imports %s: %q", w.in, w.imports, wrong)
		}
	}
	if wrong, _ := check([]tree.Package{{ImportPath: module + "/internal/attic"}}); len(wrong) != 1 {
		t.Errorf("a folder in no room: %q", wrong)
	}
}
