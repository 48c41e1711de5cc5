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
// everything. Elsewhere cells are complete, because scripts cut them.
type Table struct {
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
	if f, ok := t.w.(*os.File); ok && IsTerminal(f) {
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
	if width > 0 && !fit(widths, rows[0], width) {
		if len(widths) > 2 {
			writeBlocks(out, rows, width)
			return
		}
		widths[len(widths)-1] = max(1, width-columnGap-widths[0])
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

// writeBlocks writes each row as a block of lines: the header of a cell, and the cell,
// wrapped.
func writeBlocks(out *strings.Builder, rows [][]string, width int) {
	names := 0
	for _, name := range rows[0] {
		names = max(names, Width(name))
	}
	names = min(names, width/2)
	room := max(1, width-names-columnGap)
	for n, cells := range rows[1:] {
		if n > 0 {
			out.WriteString("\n")
		}
		for i, cell := range cells {
			name := ""
			if i < len(rows[0]) {
				name = Shorten(rows[0][i], names, Ellipsis)
			}
			for first := true; first || cell != ""; first = false {
				part := head(cell, room)
				if part == "" {
					part = cell // a character wider than the room
				}
				out.WriteString(strings.TrimRight(pad(name, names+columnGap)+part, " ") + "\n")
				name, cell = "", cell[len(part):]
			}
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
