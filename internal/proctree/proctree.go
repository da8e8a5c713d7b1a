// Package proctree finds the processes below one.
package proctree

import (
	"bytes"
	"os"
	"strconv"
)

// Below lists the processes below pid: /proc is the one place that knows them, since
// each of Postgres's processes is its own session and process group.
func Below(pid int) []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	children := make(map[int][]int)
	for _, e := range entries {
		child, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if parent, ok := Parent(child); ok {
			children[parent] = append(children[parent], child)
		}
	}
	var all []int
	for next := []int{pid}; len(next) > 0; {
		below := children[next[0]]
		all, next = append(all, below...), append(next[1:], below...)
	}
	return all
}

// Parent reads the fourth field of /proc/<pid>/stat; the second, a name in parentheses,
// may hold anything.
func Parent(pid int) (int, bool) {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, false
	}
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) < 2 {
		return 0, false
	}
	parent, err := strconv.Atoi(string(fields[1]))
	return parent, err == nil
}
