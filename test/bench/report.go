package main

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
)

// row is one line of the report.
type row struct {
	what    string
	unit    string
	values  map[string]float64 // by system
	against string             // the system that the target speaks of; empty: an absolute value
	target  float64            // of the ratio, or of the value; 0: none
	atMost  bool               // the target is an upper bound
}

type report struct {
	rows   []row
	errors []string
}

func (r *report) add(rows ...row) { r.rows = append(r.rows, rows...) }

func (r *report) failed(name string, err error) {
	r.errors = append(r.errors, fmt.Sprintf("%s was not measured: %v", name, err))
}

func value(v float64, ok bool) string {
	switch {
	case !ok:
		return "-"
	case v >= 1000:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.3f", v)
}

func (r *report) print(w io.Writer) {
	fmt.Fprintln(w)
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "MEASURED\tUNIT\tHOLDFAST\t(i) SYNC\t(ii) SINGLE\t/(i)\t/(ii)\tAIM\t")
	for _, x := range r.rows {
		h, okH := x.values["holdfast"]
		i, okI := x.values["synchronous"]
		ii, okII := x.values["single"]
		ratio := func(base float64, ok bool) (float64, bool) { return h / base, ok && okH && base > 0 }
		ri, okRI := ratio(i, okI)
		rii, okRII := ratio(ii, okII)
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t\n", x.what, x.unit, value(h, okH), value(i, okI), value(ii, okII),
			short(ri, okRI), short(rii, okRII), x.aim(h, ri, rii, okH))
	}
	tw.Flush()
	for _, e := range r.errors {
		fmt.Fprintln(w, e)
	}
}

func short(v float64, ok bool) string {
	if !ok {
		return "-"
	}
	return fmt.Sprintf("%.2f", v)
}

// aim is the target and whether it was met.
func (x row) aim(h, ri, rii float64, measured bool) string {
	if x.target == 0 {
		return ""
	}
	got, of := h, " "+x.unit
	switch x.against {
	case "synchronous":
		got, of = ri, " of (i)"
	case "single":
		got, of = rii, " of (ii)"
	}
	sign, met := ">=", got >= x.target
	if x.atMost {
		sign, met = "<=", got <= x.target
	}
	text := fmt.Sprintf("%s %g%s", sign, x.target, of)
	switch {
	case !measured:
		return text
	case met:
		return text + ": met"
	}
	return text + ": MISSED"
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(v))
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}

func percentile(sorted []float64, p float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(len(sorted)-1, int(p*float64(len(sorted))))]
}

func list(v []float64) string {
	parts := make([]string, len(v))
	for i, x := range v {
		parts[i] = value(x, true)
	}
	return strings.Join(parts, " ")
}
