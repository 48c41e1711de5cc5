package config

import (
	"fmt"
	"strings"
)

// Usage lists every field for a terminal, with its flag and variable.
func (s *Schema[C]) Usage() string {
	return "A flag takes precedence over the environment, the environment over the file, and\nthe file over the default. A dot separates sections of the file. At SIGHUP a running\nprogram applies the fields that are marked as reloaded.\n\n" +
		s.fieldList(true)
}

// FieldList lists every field for a terminal, without flags and variables.
func (s *Schema[C]) FieldList() string { return s.fieldList(false) }

func (s *Schema[C]) fieldList(names bool) string {
	var b strings.Builder
	for i := range s.Fields {
		f := &s.Fields[i]
		def := ""
		if f.Default != "" {
			def = ", default " + f.Default
		}
		if f.Reload {
			def += ", reloaded"
		}
		fmt.Fprintf(&b, "%s (%s%s)\n", f.Path, f.Kind(), def)
		if flag := f.Flag(); names && flag != "" {
			fmt.Fprintf(&b, "    --%s, %s\n", flag, s.Variable(f))
		} else if variable := s.Variable(f); names && variable != "" {
			fmt.Fprintf(&b, "    %s\n", variable)
		}
		fmt.Fprintf(&b, "    %s\n", f.Doc)
	}
	return b.String()
}

// Markdown lists every field as a table. A mark behind the name says that it is reloaded.
func (s *Schema[C]) Markdown() string {
	var b strings.Builder
	b.WriteString("| field | type | default | flag | environment | meaning |\n|---|---|---|---|---|---|\n")
	code := func(s string) string {
		if s == "" {
			return "–"
		}
		return "`" + s + "`"
	}
	for i := range s.Fields {
		f := &s.Fields[i]
		name := f.Flag()
		if name != "" {
			name = "--" + name
		}
		mark := ""
		if f.Reload {
			mark = " ↻"
		}
		fmt.Fprintf(&b, "| %s%s | %s | %s | %s | %s | %s |\n",
			code(f.Path), mark, f.Kind(), code(f.Default), code(name), code(s.Variable(f)), f.Doc)
	}
	return b.String()
}

// suggest returns the field or section that an unknown key at this depth of a section is
// taken for: the field with the same last part in another section, or what has the smallest
// edit distance; "" if nothing is near. Below a name that the operator chose, it is always
// a field of the section.
func (s *Schema[C]) suggest(path, section string, depth int) string {
	last, chosen := path[strings.LastIndex(path, ".")+1:], false
	if depth > 1 {
		_, chosen = s.section(section, depth-1)
	}
	best, least := "", 4
	if chosen {
		least = len(path) + maxPath
	}
	for i := range s.Fields {
		parts := strings.Split(s.Fields[i].Path, ".")
		name := s.Fields[i].Path
		if chosen {
			if _, ok := match(strings.Join(parts[:min(depth-1, len(parts))], "."), section); !ok {
				continue
			}
			name = section + "." + strings.Join(parts[depth-1:], ".")
		} else if d := depth; d < len(parts) && !isChosen(parts[d-1]) {
			// The section at this depth that the field is in.
			if outer := strings.Join(parts[:d], "."); distance(path, outer) < least {
				best, least = outer, distance(path, outer)
			}
		}
		if name[strings.LastIndex(name, ".")+1:] == last {
			return name
		}
		if d := distance(path, name); d < least {
			best, least = name, d
		}
	}
	return best
}

// maxPath is longer than any field's path.
const maxPath = 100

// distance returns the Levenshtein distance.
func distance(a, b string) int {
	if len(a) > 64 {
		return len(a)
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diagonal, row[j+1] = row[j+1], min(diagonal+cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
