package config_test

import (
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/renewd/renewd/internal/config"
)

// settings has a field of each kind that is more than a single value.
type settings struct {
	Name     string
	Managers []string
	Places   map[string]*place
	Wait     time.Duration
}

type place struct {
	Address string
	Keys    []string
	Count   int
}

func (s *settings) place(name string) *place {
	if s.Places == nil {
		s.Places = make(map[string]*place)
	}
	if s.Places[name] == nil {
		s.Places[name] = new(place)
	}
	return s.Places[name]
}

var schema = config.Schema[settings]{
	Env: "X_", Help: "x help config",
	Names: func(s *settings, before string) []string { return slices.Sorted(maps.Keys(s.Places)) },
	Fields: []config.Field[settings]{
		{Path: "name", Value: func(s *settings) any { return &s.Name }, Doc: "Name."},
		{Path: "team.managers", Value: func(s *settings) any { return &s.Managers }, Doc: "Managers."},
		{Path: "places.NAME.listen_address", Named: func(s *settings, name string) any { return &s.place(name).Address }, Doc: "Address."},
		{Path: "places.NAME.door.keys", Named: func(s *settings, name string) any { return &s.place(name).Keys }, Doc: "Keys."},
		{Path: "places.NAME.door.count", Named: func(s *settings, name string) any { return &s.place(name).Count }, Default: "4", Doc: "Count."},
		{Path: "wait", Value: func(s *settings) any { return &s.Wait }, Default: "5s", Doc: "Wait."},
	},
	Check: func(c *config.Checker[settings]) {
		if c.Config.Wait < 0 {
			c.Bad("wait", "is negative", "set 5s")
		}
		for name, p := range c.Config.Places {
			for i, key := range p.Keys {
				if key == "bad" {
					c.Bad(fmt.Sprintf("places.%s.door.keys[%d]", name, i), "is bad", "remove it")
				}
			}
			if reason := config.BadAddress(p.Address, false); reason != "" {
				c.Bad("places."+name+".listen_address", reason, "write it as host:port")
			}
		}
		if len(c.Config.Managers) > 1 && c.Config.Managers[1] == "bad" {
			c.Bad("team.managers[1]", "is bad", "remove it")
		}
	},
}

func load(text string, flags, env map[string]string) (*settings, error) {
	return schema.Load("x.yaml", []byte(text), flags, func(k string) string { return env[k] })
}

func TestListsAndNames(t *testing.T) {
	t.Parallel()
	file := "name: n\nteam:\n  managers:\n  - a,b\n  - c\nplaces:\n  east: {listen_address: ':1'}\n  west-2:\n    listen_address: :2\n"
	places := map[string]*place{"east": {Address: ":1", Count: 4}, "west-2": {Address: ":2", Count: 4}}
	for _, tt := range []struct {
		name       string
		text       string
		flags, env map[string]string
		want       settings
	}{
		{name: "file", text: file, want: settings{"n", []string{"a,b", "c"}, places, 5 * time.Second}},
		{name: "environment over file", text: file, env: map[string]string{"X_TEAM_MANAGERS": "x, y"},
			want: settings{"n", []string{"x", "y"}, places, 5 * time.Second}},
		{name: "flag over environment", text: file, env: map[string]string{"X_TEAM_MANAGERS": "x, y"}, flags: map[string]string{"team.managers": "z"},
			want: settings{"n", []string{"z"}, places, 5 * time.Second}},
		{name: "names with dots", text: "places:\n  a.b.c: {listen_address: ':1'}\n  d: {listen_address: ':2'}\n", want: settings{Places: map[string]*place{"a.b.c": {Address: ":1", Count: 4}, "d": {Address: ":2", Count: 4}}, Wait: 5 * time.Second}},
		{name: "fields of a name", text: "places:\n  a:\n    door: {keys: [k, l], count: 7}\n    listen_address: ':1'\n  b.c:\n    listen_address: ':2'\n    door:\n      keys: []\n",
			want: settings{Places: map[string]*place{"a": {":1", []string{"k", "l"}, 7}, "b.c": {":2", []string{}, 4}}, Wait: 5 * time.Second}},
		{name: "alias", text: "name: &a n\nteam: {managers: &l [*a]}\n", want: settings{Name: "n", Managers: []string{"n"}, Wait: 5 * time.Second}},
		{name: "nothing", want: settings{Wait: 5 * time.Second}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			got, err := load(tt.text, tt.flags, tt.env)
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(*got, tt.want) {
				t.Errorf("got %+v, want %+v", *got, tt.want)
			}
		})
	}
}

func TestProblems(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, text string
		env        map[string]string
		want       string
	}{
		{name: "value for a list", text: "team: {managers: a}", want: `x.yaml:1: team.managers: "a" is not a list; write managers: [A, B], or one "- value" a line`},
		{name: "list for a value", text: "wait: [1s]", want: `x.yaml:1: wait takes one value, not a list or a section; write wait: 5s`},
		{name: "number in a list", text: "team:\n  managers:\n  - a\n  - 7", want: `x.yaml:4: team.managers[1] is not a string; put quotes around it`},
		{name: "section in a list", text: "team:\n  managers:\n  - a: b", want: `x.yaml:3: team.managers[0] is not a string; put quotes around it`},
		{name: "empty list", text: "team: {managers: }", want: `x.yaml:1: team.managers has no value; give one or remove the line`},
		{name: "an item has its own line", text: "team:\n  managers:\n  - a\n  - bad", want: `x.yaml:4: team.managers[1]: "bad" is bad; remove it`},
		{name: "an item of the environment", text: "team:\n  managers:\n  - a\n  - good", env: map[string]string{"X_TEAM_MANAGERS": "a,bad"}, want: `X_TEAM_MANAGERS: team.managers[1]: "bad" is bad; remove it`},
		{name: "an empty item", env: map[string]string{"X_TEAM_MANAGERS": "a,,b"}, want: `X_TEAM_MANAGERS: team.managers: "a,,b" is not a list such as A,B`},
		{name: "an item as a key", text: "team: {'managers[0]': a}", want: `x.yaml:1: "team.managers[0]" is not a field; did you mean team.managers?`},
		{name: "misspelled under a name", text: "places:\n  east:\n    listen_addr: :1", want: `x.yaml:3: "places.east.listen_addr" is not a field; did you mean places.east.listen_address?`},
		{name: "misspelled under a name with dots", text: "places:\n  a.b:\n    listen_addr: :1", want: `x.yaml:3: "places.a.b.listen_addr" is not a field; did you mean places.a.b.listen_address?`},
		{name: "a name with dots as sections", text: "places:\n  a:\n    b: {listen_address: ':1'}", want: `x.yaml:3: "places.a.b" is not a field; did you mean places.a.door.keys?`},
		{name: "a name with dots twice", text: "places:\n  a.b: {listen_address: ':1'}\n  a.b: {listen_address: ':1'}", want: `x.yaml:3: places.a.b is given twice, first in line 2; keep one of the two`},
		{name: "a value of a name with dots", text: "places:\n  a.b:\n    listen_address: x", want: `x.yaml:3: places.a.b.listen_address: "x" is not host:port; write it as host:port`},
		{name: "an empty name", text: "places:\n  a.: {listen_address: ':1'}", want: `x.yaml:2: "places.a." is not a field; remove it; "x help config" lists the fields`},
		{name: "left out of its section", text: "listen_address: :1", want: `x.yaml:1: "listen_address" is not a field; did you mean places.NAME.listen_address?`},
		{name: "unknown", text: "zzzzzzzzzz: 1", want: `x.yaml:1: "zzzzzzzzzz" is not a field; remove it; "x help config" lists the fields`},
		{name: "a name without fields", text: "places:\n  east: {}", want: `x.yaml:2: places.east has no fields; give one or remove it`},
		{name: "a name with nothing", text: "places:\n  east:", want: `x.yaml:2: places.east is not a list of fields; write one "name: value" a line`},
		{name: "a value for the names", text: "places: :1", want: `x.yaml:1: places is not a list of fields; write one "name: value" a line`},
		{name: "a name twice", text: "places:\n  a: {listen_address: ':1'}\n  a: {listen_address: ':1'}", want: `x.yaml:3: places.a is given twice, first in line 2; keep one of the two`},
		{name: "one of many values", text: "places:\n  a: {listen_address: ':1'}\n  b:\n    listen_address: x", want: `x.yaml:4: places.b.listen_address: "x" is not host:port; write it as host:port`},
		{name: "an item of a name", text: "places:\n  a.b:\n    listen_address: ':1'\n    door:\n      keys: [k,\n        bad]", want: `x.yaml:6: places.a.b.door.keys[1]: "bad" is bad; remove it`},
		{name: "no integer under a name", text: "places:\n  a: {door: {count: '7'}}", want: `x.yaml:2: places.a.door.count: "7" is not an integer; write the digits without quotes and without a unit`},
		{name: "in the order of the fields", text: "wait: -1s\nplaces: {a: {listen_address: x}}", want: "x.yaml:2: places.a.listen_address: \"x\" is not host:port; write it as host:port\n" +
			"x.yaml:1: wait: -1s is negative; set 5s"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			got, err := load(tt.text+"\n", nil, tt.env)
			if err == nil {
				t.Fatalf("accepted as %+v", *got)
			}
			if err.Error() != tt.want {
				t.Errorf("got  %s\nwant %s", err, tt.want)
			}
		})
	}
}

// TestLoadList: a list of sections is parsed as strictly as a configuration.
func TestLoadList(t *testing.T) {
	t.Parallel()
	elements := func(text string) ([]config.Item[settings], error) {
		return schema.LoadList("x.yaml", []byte(text), "entries")
	}
	items, err := elements("entries:\n- name: a\n  wait: 1s\n# between\n-\n  name: b\n  team: {managers: [c]}\n")
	if err != nil {
		t.Fatal(err)
	}
	want := []config.Item[settings]{
		{Config: &settings{Name: "a", Wait: time.Second}, Line: 2},
		{Config: &settings{Name: "b", Managers: []string{"c"}, Wait: 5 * time.Second}, Line: 6},
	}
	if !reflect.DeepEqual(items, want) {
		t.Errorf("got %+v", items)
	}
	if items, err := elements("entries: []\n"); err != nil || len(items) != 0 {
		t.Errorf("a list of nothing: %v %v", items, err)
	}
	const unset = `x.yaml: entries is not set; write "entries: []" if the list is meant to be empty`
	for _, tt := range []struct{ text, want string }{
		{"", unset},
		{"# a comment", unset},
		{"---", unset},
		{"null", unset},
		{"{}", unset},
		{"entries:", `x.yaml:1: entries has no value; write "entries: []" if the list is meant to be empty`},
		{"entries: []\nentries: []", "x.yaml:2: entries is given twice, first in line 1; keep one of the two"},
		{"entries: []\n---\nentries: []", "x.yaml:2: the file has more than one document; remove everything from the second --- on"},
		{"- name: a", `x.yaml:1: is not a list of fields; write one "name: value" a line`},
		{"entry: []", `x.yaml:1: "entry" is not a field; the only one is entries`},
		{"entries: a", `x.yaml:1: entries is not a list; write each element as "- name: value" and its further fields below`},
		{"entries:\n- a", `x.yaml:2: entries[0] is not a section; write it as "- name: value" and its further fields below`},
		{"entries:\n- name: a\n  nam: b", `x.yaml:3: "entries[0].nam" is not a field; did you mean name?`},
		{"entries:\n- name: a\n  name: b", `x.yaml:3: entries[0].name is given twice, first in line 2; keep one of the two`},
		{"entries:\n- wait: -1s\n- wait: 5", "x.yaml:2: entries[0].wait: -1s is negative; set 5s\nx.yaml:3: entries[1].wait: \"5\" has no unit; write it with a unit, such as 500ms, 60s or 5m"},
		{"entries: [", `x.yaml:1: is not YAML: did not find expected node content; check the indentation and the quotes around it`},
	} {
		if _, err := elements(tt.text + "\n"); err == nil || err.Error() != tt.want {
			t.Errorf("%q\ngot  %v\nwant %s", tt.text, err, tt.want)
		}
	}
}

// TestUsage: fields without a flag or a variable are documented without them.
func TestUsage(t *testing.T) {
	t.Parallel()
	usage, table := schema.Usage(), schema.Markdown()
	for _, want := range []string{
		"team.managers (list of strings)\n    --team-managers, X_TEAM_MANAGERS\n    Managers.\n",
		"places.NAME.listen_address (string)\n    Address.\n",
		"wait (duration, default 5s)\n",
	} {
		if !strings.Contains(usage, want) {
			t.Errorf("no %q in\n%s", want, usage)
		}
	}
	if want := "| `places.NAME.listen_address` | string | – | – | – | Address. |\n"; !strings.Contains(table, want) {
		t.Errorf("no %q in\n%s", want, table)
	}
}

// FuzzLoad: no file causes a panic, and every error has a place and a cause.
func FuzzLoad(f *testing.F) {
	f.Add("name: n\nteam: {managers: [a, 'b']}\nplaces: {east: {listen_address: ':1'}}\n")
	f.Add("entries:\n- name: a\n- &x {wait: 1s}\n- *x\n")
	f.Add("places: {'': {'': 1}, a.b: {listen_address: x}}\nteam: {'managers[0]': a}\n")
	f.Fuzz(func(t *testing.T, text string) {
		_, err := load(text, nil, nil)
		_, listErr := schema.LoadList("x.yaml", []byte(text), "entries")
		for _, err := range []error{err, listErr} {
			var problems config.Error
			if err != nil && !errors.As(err, &problems) {
				t.Fatalf("%T: %v", err, err)
			}
			for _, p := range problems {
				if p.What == "" || !strings.HasPrefix(p.Where, "x.yaml") {
					t.Errorf("problem without place or reason: %+v", p)
				}
			}
		}
	})
}

// TestChanges: the fields that differ, with both values, also of sections that only one
// configuration has.
func TestChanges(t *testing.T) {
	t.Parallel()
	const base = "name: n\nplaces: {east: {listen_address: ':1'}, a.b: {listen_address: ':3'}}\n"
	reloading := schema
	reloading.Fields = slices.Clone(schema.Fields)
	for i := range reloading.Fields {
		f := &reloading.Fields[i]
		f.Reload = f.Path != "name" && f.Path != "places.NAME.listen_address"
		f.Secret = f.Path == "name"
	}
	for _, tt := range []struct{ name, text, changes, refused string }{
		{"nothing", base, "", ""},
		{"spelled otherwise", "name: n\nwait: 5000ms\nplaces: {a.b: {listen_address: ':3', door: {count: 4}}, east: {listen_address: ':1'}}\n", "", ""},
		{"a secret", "name: other\nplaces: {east: {listen_address: ':1'}, a.b: {listen_address: ':3'}}\n", "name", "name"},
		{"values", base + "wait: 1m\nteam: {managers: [a, b]}\n", `team.managers: not set -> ["a" "b"], wait: 5s -> 1m`, ""},
		{"an empty list", base + "team: {managers: []}\n", `team.managers: not set -> []`, ""},
		{"values of a section", "name: n\nplaces: {east: {listen_address: ':1', door: {count: 5, keys: [k]}}, a.b: {listen_address: ':3'}}\n",
			`places.east.door.keys: not set -> ["k"], places.east.door.count: 4 -> 5`, ""},
		{"sections", "name: n\nplaces: {west: {listen_address: ':2'}, a.b: {listen_address: ':4'}}\n",
			`places.a.b.listen_address: ":3" -> ":4", places.east.listen_address: ":1" -> not set, places.west.listen_address: not set -> ":2", ` +
				`places.east.door.count: 4 -> not set, places.west.door.count: not set -> 4`,
			`places.a.b.listen_address (running ":3", new ":4"), places.east.listen_address (running ":1", new not set), places.west.listen_address (running not set, new ":2")`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			from, err := load(base, nil, nil)
			if err != nil {
				t.Fatal(err)
			}
			to, err := load(tt.text, nil, nil)
			if err != nil {
				t.Fatal(err)
			}
			var shown []string
			for _, c := range reloading.Changes(from, to) {
				shown = append(shown, c.String())
			}
			if got := strings.Join(shown, ", "); got != tt.changes {
				t.Errorf("changes %s\nwant    %s", got, tt.changes)
			}
			changes, err := reloading.Reloadable(from, to)
			switch {
			case tt.refused == "" && (err != nil || len(changes) != len(shown)):
				t.Errorf("refused: %v", err)
			case tt.refused != "" && (err == nil || err.Error() != tt.refused+": not changed while the program runs; restart it, or undo this and reload"):
				t.Errorf("refused: %v\nwant     %s", err, tt.refused)
			}
			if len(from.Places) != 2 {
				t.Errorf("the comparison has added places: %v", from.Places)
			}
		})
	}
}
