package cli

import (
	"fmt"
	"io"
	"os"
	"strings"
)

const (
	columnGap = 2
	// leastColumn is the least width to which a column is shortened. A table that needs
	// less shows a block of lines for each row.
	leastColumn = 16
)

// Table writes aligned columns. What is written to it are lines of cells, separated by
// tabs. Lines up to an empty one are a part with columns of its own. A part of more than
// two columns begins with its header.
//
// On a terminal a table is never wider than that: it leaves out the middle of the widest
// cells, or, if little of them would be left, writes each row as a block of lines, with
// everything. A table of names and values wraps the values. Elsewhere cells are complete,
// because scripts cut them.
type Table struct {
	// Whole keeps all lines as they are on a terminal, too: they are copied from it.
	Whole bool

	w    io.Writer
	text strings.Builder
}

// NewTable returns a table, which the caller must flush. Cells pass through
// [PrintableLines].
func NewTable(w io.Writer) *Table { return &Table{w: w} }

// Write implements io.Writer. It has no error.
func (t *Table) Write(b []byte) (int, error) { return t.text.Write(b) }

// Flush writes the table.
func (t *Table) Flush() error {
	width := 0
	if f, ok := t.w.(*os.File); ok && !t.Whole && IsTerminal(f) {
		width, _ = size(f)
	}
	var out strings.Builder
	for i, part := range strings.Split(strings.TrimSuffix(PrintableLines(t.text.String()), "\n"), "\n\n") {
		if i > 0 {
			out.WriteString("\n")
		}
		// An empty first line separates the table from what was written before.
		if text, found := strings.CutPrefix(part, "\n"); found {
			out.WriteString("\n")
			part = text
		}
		writePart(&out, part, width)
	}
	t.text.Reset()
	_, err := io.WriteString(t.w, out.String())
	return err
}

// writePart writes one part of a table; a width of 0 is no limit.
func writePart(out *strings.Builder, part string, width int) {
	var rows [][]string
	var widths []int
	for line := range strings.SplitSeq(part, "\n") {
		cells := strings.Split(line, "\t")
		rows = append(rows, cells)
		for i, cell := range cells {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			if len(cells) > 1 {
				widths[i] = max(widths[i], Width(cell))
			}
		}
	}
	switch {
	case width == 0 || len(widths) == 1:
	case len(widths) == 2 && widths[0]+columnGap+widths[1] > width:
		writePairs(out, rows, width)
		return
	case !fit(widths, rows[0], width):
		for i, cells := range rows[1:] {
			if i > 0 {
				out.WriteString("\n")
			}
			writePairs(out, pairs(rows[0], cells), width)
		}
		return
	}
	for _, cells := range rows {
		var line strings.Builder
		for i, cell := range cells {
			if width > 0 && len(cells) == 1 {
				cell = Shorten(cell, width, Ellipsis)
			} else if width > 0 {
				cell = ShortenMiddle(cell, widths[i], Ellipsis)
			}
			if i < len(cells)-1 {
				cell = pad(cell, widths[i]+columnGap)
			}
			line.WriteString(cell)
		}
		out.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
}

// fit reduces the widest columns until the row fits, and reports whether that leaves
// leastColumn and the header of each.
func fit(widths []int, header []string, width int) bool {
	total := columnGap * (len(widths) - 1)
	for _, w := range widths {
		total += w
	}
	for total > width {
		widest := 0
		for i, w := range widths {
			if w >= widths[widest] { // of equal ones the last
				widest = i
			}
		}
		least := leastColumn
		if widest < len(header) {
			least = max(least, Width(header[widest]))
		}
		if widths[widest] <= least {
			return false
		}
		widths[widest]--
		total--
	}
	return true
}

// pairs returns a row as pairs of header and cell.
func pairs(header, cells []string) [][]string {
	var out [][]string
	for i, cell := range cells {
		name := ""
		if i < len(header) && len(cells) > 1 {
			name = header[i]
		}
		out = append(out, []string{name, cell})
	}
	return out
}

// writePairs writes a line for each name and value. The value is wrapped.
func writePairs(out *strings.Builder, rows [][]string, width int) {
	names := 0
	for _, row := range rows {
		names = max(names, Width(row[0]))
	}
	names = min(names, width/2)
	room := max(1, width-names-columnGap)
	for _, row := range rows {
		name, value := Shorten(row[0], names, Ellipsis), strings.Join(row[1:], " ")
		for first := true; first || value != ""; first = false {
			part := head(value, room)
			if part == "" {
				part = value // a character wider than the room
			}
			out.WriteString(strings.TrimRight(pad(name, names+columnGap)+part, " ") + "\n")
			name, value = "", value[len(part):]
		}
	}
}

// Flush writes a table.
func Flush(table interface{ Flush() error }) error {
	if err := table.Flush(); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}
