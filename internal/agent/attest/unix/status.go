package unix

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
)

// maxGroups bounds the work that one process can cause. Linux allows 65,536
// supplementary groups, and entries name only a few.
const maxGroups = 1024

// status has the credentials in /proc/PID/status.
type status struct {
	uid, gid   uint32 // effective
	groups     []uint32
	moreGroups bool // than maxGroups
}

// parseStatus reads the lines Uid, Gid and Groups: proc_pid_status(5). The
// kernel escapes line ends in the command's name, so no process can forge a
// line. Uid and Gid are required; without a Groups line there are no groups.
func parseStatus(text []byte) (status, error) {
	var st status
	var hasUID, hasGID, hasGroups bool
	for line := range bytes.Lines(text) {
		name, value, found := bytes.Cut(line, []byte(":"))
		if !found {
			continue
		}
		var err error
		switch string(name) {
		case "Uid":
			st.uid, err = effective(value)
			hasUID = true
		case "Gid":
			st.gid, err = effective(value)
			hasGID = true
		case "Groups":
			st.groups, st.moreGroups, err = parseGroups(value)
			hasGroups = true
		}
		if err != nil {
			return status{}, fmt.Errorf("line %s: %w", name, err)
		}
		if hasUID && hasGID && hasGroups {
			break
		}
	}
	if !hasUID || !hasGID {
		return status{}, errors.New("no Uid or Gid line")
	}
	return st, nil
}

// effective returns the second of the four IDs real, effective, saved, file system.
func effective(value []byte) (uint32, error) {
	n := 0
	for field := range bytes.FieldsSeq(value) {
		if n == 1 {
			return parseID(field)
		}
		n++
	}
	return 0, errors.New("no effective ID")
}

// parseGroups returns the first maxGroups groups, and whether there are more.
func parseGroups(value []byte) (groups []uint32, more bool, err error) {
	for field := range bytes.FieldsSeq(value) {
		if len(groups) == maxGroups {
			return groups, true, nil
		}
		id, err := parseID(field)
		if err != nil {
			return nil, false, err
		}
		groups = append(groups, id)
	}
	return groups, false, nil
}

func parseID(field []byte) (uint32, error) {
	id, err := strconv.ParseUint(string(field), 10, 32)
	if err != nil {
		return 0, errors.New("not an ID")
	}
	return uint32(id), nil
}
