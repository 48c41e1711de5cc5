package config

import (
	"bytes"
	"regexp"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

const (
	// maxSyntax is how many parts of a file that are not YAML are reported.
	maxSyntax = 5
	// maxParts bounds the parts of a file that are looked at one by one. A configuration
	// has fewer than a hundred.
	maxParts = 1000
)

// rest reports the parts of a file that are not YAML, or err if each one is for itself. It
// returns the root of the other parts, so that their problems are found as well; nil if
// there is none. A part is a field at the start of a line with what is below it.
func (r *reader) rest(data []byte, err error) *yaml.Node {
	r.partial = true
	lines := bytes.Split(data, []byte("\n"))
	parts, wrong := 0, 0
	for begin := 0; begin < len(lines); parts++ {
		if parts == maxParts {
			clear(lines[begin:])
			break
		}
		end := begin + 1
		for end < len(lines) && !isTop(lines[end]) {
			end++
		}
		if p := r.part(lines[begin:end], begin); p != nil {
			if wrong++; wrong <= maxSyntax {
				r.out = append(r.out, *p)
			}
			clear(lines[begin:end])
		}
		begin = end
	}
	if wrong == 0 {
		r.out = append(r.out, syntax(r.file, lines, 0, err))
		return nil
	}
	var doc yaml.Node
	if yaml.Unmarshal(bytes.Join(lines, []byte("\n")), &doc) != nil || doc.Kind == 0 || doc.Content[0].Kind != yaml.MappingNode {
		return nil
	}
	return doc.Content[0]
}

// part returns what is wrong with the YAML of a part, which begins after so many lines; nil
// if nothing is.
func (r *reader) part(lines [][]byte, after int) *Problem {
	var doc yaml.Node
	switch err := yaml.Unmarshal(bytes.Join(lines, []byte("\n")), &doc); {
	case err != nil && isAnchor(err):
		return nil // it may be in another part
	case err != nil:
		p := syntax(r.file, lines, after, err)
		return &p
	case doc.Kind != 0 && doc.Content[0].Kind == yaml.ScalarNode && doc.Content[0].ShortTag() != "!!null":
		return &Problem{Where: r.place(after + doc.Content[0].Line), What: "is not a field with a value", Remedy: "write one \"name: value\" a line"}
	}
	return nil
}

// isTop reports whether a part begins in a line.
func isTop(line []byte) bool {
	return len(line) > 0 && !strings.ContainsRune(" \t\r#-}]", rune(line[0]))
}

var yamlLine = regexp.MustCompile(`^yaml: (?:line (\d+): )?`)

// isAnchor reports whether an error is that of an alias. It has no line, and the name may
// be a secret that begins with *.
func isAnchor(err error) bool { return strings.Contains(err.Error(), "anchor") }

// syntax converts an error of the YAML parser about lines that begin after so many others.
func syntax(file string, lines [][]byte, after int, err error) Problem {
	if isAnchor(err) {
		return Problem{Where: file, What: "is not YAML: an alias has no anchor", Remedy: "check the indentation and the quotes around it"}
	}
	line, text := 1, err.Error() // the parser omits the number of the first line
	if m := yamlLine.FindStringSubmatch(text); m != nil {
		if n, err := strconv.Atoi(m[1]); err == nil {
			line = n
		}
		text = text[len(m[0]):]
	}
	p := Problem{What: "is not YAML: " + text, Remedy: "check the indentation and the quotes around it"}
	// The parser is at the line of the tab, or at the one before it.
	for n := line; n <= min(line+1, len(lines)); n++ {
		if indent := lines[n-1][:len(lines[n-1])-len(bytes.TrimLeft(lines[n-1], " \t"))]; bytes.ContainsRune(indent, '\t') {
			line, p = n, Problem{What: "is indented by a tab, which YAML does not allow", Remedy: "indent it by spaces"}
			break
		}
	}
	p.Where = file + ":" + strconv.Itoa(after+line)
	return p
}
