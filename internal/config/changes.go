package config

import (
	"cmp"
	"fmt"
	"reflect"
	"slices"
	"strings"
)

// Change is a field whose values differ in two configurations.
type Change struct {
	Path     string // of the file, with the name in the place of a placeholder
	From, To string // as shown in problems; empty for a secret and for no value
	Reload   bool   // see [Field]
	secret   bool
}

// String returns the change in one line.
func (c Change) String() string { return c.format("%s: %s -> %s") }

// format formats the field and its values, which a secret does not show.
func (c Change) format(verbs string) string {
	if c.secret {
		return c.Path
	}
	return fmt.Sprintf(verbs, c.Path, cmp.Or(c.From, "not set"), cmp.Or(c.To, "not set"))
}

// Changes returns the fields whose values differ, in the order of the documentation. A
// field of a section with a name that only one of the two has differs, unless it has no
// value there.
func (s *Schema[C]) Changes(from, to *C) []Change {
	var out []Change
	for i := range s.Fields {
		f := &s.Fields[i]
		if !f.chosen() {
			out = f.appendChange(out, f.Path, f.at(from, "", true), f.at(to, "", true))
			continue
		}
		before := beforeName(f.Path)
		had, has := s.Names(from, before), s.Names(to, before)
		names := slices.Concat(had, has)
		slices.Sort(names)
		for _, name := range slices.Compact(names) {
			out = f.appendChange(out, concrete(f.Path, name), f.at(from, name, slices.Contains(had, name)), f.at(to, name, slices.Contains(has, name)))
		}
	}
	return out
}

// held is a value of a field, and how it is shown.
type held struct {
	value any
	text  string
}

// at returns the field's value for a name; the value of an empty configuration if c does
// not have that name.
func (f *Field[C]) at(c *C, name string, has bool) held {
	if !has {
		c = new(C)
	}
	v := reflect.ValueOf(f.pointer(c, name)).Elem()
	h := held{value: v.Interface()}
	if empty := v.Kind() == reflect.Slice && v.IsNil() || v.Kind() != reflect.Slice && v.IsZero(); !empty || has && f.Default != "" {
		h.text = f.show(c, name, -1)
	}
	return h
}

func (f *Field[C]) appendChange(out []Change, path string, from, to held) []Change {
	if reflect.DeepEqual(from.value, to.value) {
		return out
	}
	return append(out, Change{Path: path, From: from.text, To: to.text, Reload: f.Reload, secret: f.Secret})
}

// RestartError refuses a configuration because fields that the running program cannot
// change have other values in it.
type RestartError []Change

// Error names the fields with both values.
func (e RestartError) Error() string {
	all := make([]string, len(e))
	for i, c := range e {
		all[i] = c.format("%s (running %s, new %s)")
	}
	return strings.Join(all, ", ") + ": not changed while the program runs; restart it, or undo this and reload"
}

// Reloadable returns the fields that differ, or a [RestartError] of those that cannot
// change while the program runs.
func (s *Schema[C]) Reloadable(running, next *C) ([]Change, error) {
	changes := s.Changes(running, next)
	var restart RestartError
	for _, c := range changes {
		if !c.Reload {
			restart = append(restart, c)
		}
	}
	if len(restart) > 0 {
		return nil, restart
	}
	return changes, nil
}
