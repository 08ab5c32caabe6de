"""One page of HTML with charts, from a comparison or from run folders: `page.write_report`."""
