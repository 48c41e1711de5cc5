package layout

import (
	"encoding/json"
	"fmt"
	"maps"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/renewd/renewd"

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
var ground = []string{"api", "cli", "clock", "config", "listen", "loglimit", "refusal", "socket"}

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

// pkg is a package as go list shows it, without its tests.
type pkg struct {
	ImportPath string
	Imports    []string
}

func (p pkg) folder() string { return strings.TrimPrefix(p.ImportPath, module+"/") }

// list returns the packages of the module in folder dir.
func list(t *testing.T, dir string) (out []pkg) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-json=ImportPath,Imports", "./...")
	cmd.Dir = dir
	b, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	for d := json.NewDecoder(strings.NewReader(string(b))); d.More(); {
		var p pkg
		if err := d.Decode(&p); err != nil {
			t.Fatal(err)
		}
		out = append(out, p)
	}
	return out
}

// check returns what is wrong with the imports of packages, and what goes from
// which room to which.
func check(all []pkg) (wrong []string, graph map[room]map[room]int) {
	graph = make(map[room]map[room]int)
	for _, p := range all {
		from := roomOf(p.folder())
		if from == "" || arrows[from] == nil {
			wrong = append(wrong, p.folder()+" is in no room")
			continue
		}
		if graph[from] == nil {
			graph[from] = make(map[room]int)
		}
		for _, i := range p.Imports {
			if slices.Contains(withoutGRPC, from) && strings.HasPrefix(i, "google.golang.org/grpc") {
				wrong = append(wrong, p.folder()+" imports "+i)
			}
			folder, ours := strings.CutPrefix(i, module+"/")
			to := roomOf(folder)
			if !ours || to == from {
				continue
			}
			graph[from][to]++
			if !slices.Contains(arrows[from], to) {
				wrong = append(wrong, fmt.Sprintf("%s imports %s: not from %s to %s", p.folder(), folder, from, to))
			}
		}
	}
	return wrong, graph
}

// TestArrows: packages import what the rooms that they are in may import.
func TestArrows(t *testing.T) {
	t.Parallel()
	all := list(t, "../..")
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
	_, table, _ := strings.Cut(string(read(t, "ARCHITECTURE.md")), "\n## The rooms\n")
	table, _, _ = strings.Cut(table, "\n## ")
	var want, got []string
	for _, p := range list(t, "../..") {
		want = append(want, p.folder())
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
		if wrong, _ := check([]pkg{{module + "/" + w.in, []string{w.imports}}}); len(wrong) != 1 && w.sentence {
			t.Errorf("%s imports %s: %q", w.in, w.imports, wrong)
		}
	}
	if wrong, _ := check([]pkg{{ImportPath: module + "/internal/attic"}}); len(wrong) != 1 {
		t.Errorf("a folder in no room: %q", wrong)
	}
}
